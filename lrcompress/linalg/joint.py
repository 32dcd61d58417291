"""One dictionary for several weights, each with a Gram of its own (GeoPair): min Σ_b ‖(W_b - C_b D) G_b^½‖².

No Gram stands for another: the codes of a weight are pursued in its own metric, and D solves the normal equations
Σ_b C_bᵀ C_b D G_b = Σ_b C_bᵀ W_b G_b, which no product of inverses solves, by preconditioned conjugate gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.linalg.dictionary import RIDGES, SparseCode, check_finite, least_squares_dictionary, stalled
from lrcompress.linalg.pursuit import Alternation, Pursuit
from lrcompress.linalg.sparse_coding import RELAXATION, htp
from lrcompress.linalg.whitening import symmetric_root
from lrcompress.precision import exact, wide, widened

FIRST_ROUNDS = 4
"""Rounds on the stacked weights in the mean metric, where the dictionary begins."""

DICTIONARY_STEPS = 4
"""Conjugate gradient steps of a round, from the last dictionary on."""

FINAL_STEPS = 30

EXACT = 1e-20
"""Conjugate gradients end where the residual's squared size is below this share of what it was."""


@dataclass
class JointCode:
    """dictionary (k, p); per weight codes (n_b, k) and support (n_b, k); objectives: the sum after every round."""

    dictionary: Tensor
    codes: list[Tensor]
    supports: list[Tensor]
    objectives: list[Tensor]


class SharedDictionary:
    """The least-squares dictionary of weights (n_b, p) in the metrics of Grams (p, p), identities where None."""

    def __init__(self, weights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> None:
        self._grams = grams
        self.seen = [_times(w, g) for w, g in zip(weights, grams, strict=True)]
        present = [g for g in grams if g is not None]
        self._factor = None
        if present:
            mean = torch.stack(present).mean(0)
            size = mean.diagonal().mean().clamp_min(torch.finfo(mean.dtype).tiny)
            self._factor = _factor(mean / size, torch.ones_like(mean[0]))

    def solve(self, codes: Sequence[Tensor], start: Tensor, steps: int) -> Tensor:
        """D (k, p) from `start`; no step raises the objective, and atoms that no code uses stay as they are."""
        squares = [c.mT @ c for c in codes]
        rows = _factor(torch.stack(squares).mean(0), None)
        found = start.clone()
        residual = sum(c.mT @ s for c, s in zip(codes, self.seen, strict=True)) - self._image(squares, found)
        steepest = self._preconditioned(rows, residual)
        direction, size = steepest.clone(), (residual * steepest).sum()
        enough = EXACT * size
        for _ in range(steps):
            image = self._image(squares, direction)
            curvature = (direction * image).sum()
            if not bool(curvature > 0) or not bool(size > enough):
                break
            found = found + (size / curvature) * direction
            residual = residual - (size / curvature) * image
            steepest = self._preconditioned(rows, residual)
            fresh = (residual * steepest).sum()
            direction, size = steepest + (fresh / size) * direction, fresh
        return found

    def _image(self, squares: Sequence[Tensor], dictionary: Tensor) -> Tensor:
        return torch.stack([_times(a @ dictionary, g) for a, g in zip(squares, self._grams, strict=True)]).sum(0)

    def _preconditioned(self, rows: Tensor, residual: Tensor) -> Tensor:
        found = torch.cholesky_solve(residual, rows)
        return found if self._factor is None else torch.cholesky_solve(found.mT, self._factor).mT


def joint_htp(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor | None],
    atoms: int,
    nonzeros: int,
    turns: Alternation,
) -> JointCode:
    """`htp` of several weights (n_b, p) with one dictionary (atoms, p), atoms <= n_b. No round raises the sum."""
    for weight in weights:
        check_finite(weight)
    code = _first(weights, grams, atoms, nonzeros, Alternation(min(turns.rounds, FIRST_ROUNDS), pursuit=turns.pursuit))
    sizes = [len(w) for w in weights]
    dictionary = code.dictionary
    codes, supports = list(code.codes.split(sizes)), list(code.support.split(sizes))
    shared = SharedDictionary(weights, grams)
    energies = [_summed(s * w) for s, w in zip(shared.seen, weights, strict=True)]
    pursuits = [turns.pursuit(w)(w, nonzeros, energy=e) for w, e in zip(weights, energies, strict=True)]
    objectives: list[Tensor] = []
    for _ in range(turns.rounds):
        best = shared.solve(codes, dictionary, DICTIONARY_STEPS)
        dictionary = torch.lerp(dictionary, best, RELAXATION)
        for b, pursuit in enumerate(pursuits):
            codes[b], supports[b] = _pursue(pursuit, dictionary, grams[b], shared.seen[b], codes[b], supports[b])
        objectives.append(torch.stack([p.error for p in pursuits]).sum())
        if stalled(objectives, turns.tolerance):
            break
    # The relaxed dictionary went past the best one for the last codes.
    return JointCode(shared.solve(codes, dictionary, DICTIONARY_STEPS), codes, supports, objectives)


def _first(
    weights: Sequence[Tensor], grams: Sequence[Tensor | None], atoms: int, nonzeros: int, turns: Alternation
) -> SparseCode:
    """A code of the stacked weights in the mean of the metrics."""
    stacked = torch.cat(list(weights))
    present = [g for g in grams if g is not None]
    target = stacked
    if present:
        target = stacked @ symmetric_root(torch.stack(present).mean(0)).to(stacked.dtype)
    code = htp(target, atoms, nonzeros, turns)
    dictionary = least_squares_dictionary(widened(stacked), widened(code.codes)).to(stacked.dtype)
    return SparseCode(dictionary, code.codes, code.support)


def _pursue(
    pursuit: Pursuit, dictionary: Tensor, gram: Tensor | None, seen: Tensor, codes: Tensor, support: Tensor
) -> tuple[Tensor, Tensor]:
    """A step of a pursuit in a weight's own metric, on atoms that are of norm 1 there."""
    products, squares = seen @ dictionary.mT, _times(dictionary, gram) @ dictionary.mT
    norms = squares.diagonal().clamp_min(0).sqrt()
    norms = torch.where(norms > norms.max() * RIDGES[codes.dtype], norms, 1.0)
    codes, support = pursuit.advance(squares / norms / norms[:, None], products / norms, codes * norms, support)
    return codes / norms, support


def _summed(matrix: Tensor) -> Tensor:
    if wide(matrix.device) == torch.float64:
        return matrix.double().sum()
    return exact(matrix.sum(-1)).sum()


def _times(matrix: Tensor, gram: Tensor | None) -> Tensor:
    return matrix if gram is None else matrix @ gram


def _factor(gram: Tensor, ridge: Tensor | None) -> Tensor:
    """Cholesky factor of gram plus a small ridge, of its own diagonal where none is given (1 for unused rows)."""
    diagonal = gram.diagonal()
    own = torch.where(diagonal > 0, diagonal, 1.0) if ridge is None else ridge
    for stronger in (1.0, 1e2, 1e4):
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(own * RIDGES[gram.dtype] * stronger))
        if not bool(failed):
            return factor
    raise ArithmeticError("the normal equations of the shared dictionary are singular")
