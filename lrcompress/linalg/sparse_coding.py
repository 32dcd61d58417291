"""Solvers of Y ≈ C D with exactly s coefficients in every row of C; see dictionary.py for the convention."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrcompress.linalg.dictionary import (
    SparseCode,
    check_finite,
    largest,
    leading_directions,
    least_squares_codes,
    least_squares_dictionary,
    normalised,
    polar,
    refit,
    stalled,
)
from lrcompress.linalg.ksvd import ksvd

RELAXATION = 1.98
"""A dictionary step goes this many times as far as the least-squares dictionary. The error for given codes is a
parabola along that line, so below 2 it still falls; measured, the alternation needs a third of the rounds."""

REFIT_STEPS = 2
"""Conjugate gradient steps per round: a third makes no difference, with one alone the error is some per cent higher."""

WIDE = 1.35
"""The first round of htp keeps so many times the coefficients."""

MOMENTUM = 0.25
"""Share of its last step by which a dictionary goes on. With both, 15 rounds leave the demo's weights 0.94 to 1 times
the error of 24 rounds without."""

LAST_STEPS = 4
"""Conjugate gradient steps at the end of `htp`."""

STEP_GROWTH, STEP_LIMIT = 1.2, 2.0
"""A row whose new support was better takes longer gradient steps, one that refused it halves its step."""


def procrustes(target: Tensor, atoms: int, nonzeros: int, rounds: int, tolerance: float = 0.0) -> SparseCode:
    """Orthonormal dictionary and hard threshold in turn (COMPOT, 2602.15200); atoms <= min(n, p).

    Begins at the leading singular vectors; C = H_s(Y Dᵀ) is optimal for an orthonormal D, D = polar(Cᵀ Y) for C.
    """
    check_finite(target)
    dictionary = leading_directions(target, atoms)
    energy = target.double().square().sum((-2, -1))
    objectives: list[Tensor] = []
    for step in range(rounds + 1):
        codes = target @ dictionary.mT
        support = largest(codes, nonzeros)
        codes = codes * support
        objectives.append((energy - codes.double().square().sum((-2, -1))).clamp_min(0))
        if stalled(objectives, tolerance):
            break
        if step < rounds:
            dictionary = polar(codes.mT @ target)
    return SparseCode(dictionary, codes, support, objectives)


def htp(
    target: Tensor,
    atoms: int,
    nonzeros: int,
    rounds: int,
    tolerance: float = 0.0,
    kind: "type[Pursuit] | None" = None,
) -> SparseCode:
    """Free dictionary and hard thresholding pursuit in turn, begun at the leading singular vectors; atoms <= n.

    As in GeoPair: D by least squares, here over-relaxed, then supports from a gradient step and coefficients
    refitted on them by least squares. The first round keeps more coefficients; objectives are those since a row has its
    `nonzeros`. No round raises them: what momentum makes worse is not kept. `kind` pursues, by default in torch.
    """
    check_finite(target)
    first = min(atoms, *target.shape[-2:])
    wide = min(round(WIDE * nonzeros), atoms) if rounds > 1 else nonzeros
    start = procrustes(target, first, min(wide, first), 0)
    objectives = start.objectives if wide == nonzeros else []
    code = _widened(target, start, atoms, wide)
    pursuit, previous = (kind or Pursuit)(target, wide), code.dictionary
    for step in range(rounds):
        best = least_squares_dictionary(target, code.codes, code.dictionary)
        moved = torch.lerp(code.dictionary, best, RELAXATION).add_(code.dictionary - previous, alpha=MOMENTUM)
        previous = code.dictionary
        tried = pursuit.step(*normalised(moved, code.codes), code.support)
        if step == 0:
            pursuit.narrow(nonzeros)
            if wide > nonzeros:
                code = tried
                continue
        worse = pursuit.error > objectives[-1] if objectives else torch.zeros_like(pursuit.error, dtype=torch.bool)
        code = _either(worse, code, tried)
        objectives.append(torch.minimum(pursuit.error, objectives[-1]) if objectives else pursuit.error)
        if stalled(objectives, tolerance) and not bool(worse.any()):
            break
    if rounds:
        code = _settled(target, code)
        objectives.append(code.error(target))
    return SparseCode(code.dictionary, code.codes, code.support, objectives)


def _settled(target: Tensor, code: SparseCode) -> SparseCode:
    """`code`, whose dictionary went past the best one, with that and codes refitted to it, where that is better."""
    exact = least_squares_dictionary(target, code.codes, code.dictionary)
    dictionary, codes = normalised(exact, code.codes)
    products = target @ dictionary.mT
    codes = least_squares_codes(dictionary @ dictionary.mT, products, code.support, codes, LAST_STEPS)
    found = SparseCode(dictionary, codes, code.support)
    return _either(found.error(target) <= code.error(target), found, code)  # not where both are rounding alone


def _either(first: Tensor, one: SparseCode, other: SparseCode) -> SparseCode:
    """`one` where `first` (...) says so, else `other`."""
    if first.dim() == 0:
        return one if bool(first) else other
    where = first[..., None, None]
    dictionary = torch.where(where, one.dictionary, other.dictionary)
    return SparseCode(
        dictionary, torch.where(where, one.codes, other.codes), torch.where(where, one.support, other.support)
    )


def _widened(target: Tensor, start: SparseCode, atoms: int, nonzeros: int) -> SparseCode:
    """`start` with `atoms` atoms, the further ones the residuals of the rows served worst, and `nonzeros` per row."""
    dictionary, codes, support = start.dictionary, start.codes, start.support
    more = atoms - dictionary.shape[-2]
    if more > 0:
        residual = target - codes @ dictionary
        worst = residual.square().sum(-1).topk(more, dim=-1).indices
        extra = residual.gather(-2, worst[..., None].expand(*worst.shape, target.shape[-1]))
        blank = codes.new_zeros(*codes.shape[:-1], more)
        dictionary, codes = normalised(torch.cat([dictionary, extra], -2), torch.cat([codes, blank], -1))
        support = torch.cat([support, blank.bool()], -1)
    if nonzeros > start.support.shape[-1]:
        support = largest(torch.where(support, torch.inf, target @ dictionary.mT), nonzeros)
    return SparseCode(dictionary, codes, support)


class Pursuit:
    """Hard thresholding pursuit, a step at a time, on the rows of a target (..., n, p), each with its own length."""

    error: Tensor
    """(...) squared error after the last step, float64."""

    def __init__(
        self, target: Tensor, nonzeros: int, refit_steps: int = REFIT_STEPS, energy: Tensor | None = None
    ) -> None:
        self.nonzeros, self.refit_steps = nonzeros, refit_steps
        self.length = target.new_ones(*target.shape[:-1], 1)
        self._target, self._narrower = target, False
        self._energy = target.double().square().sum((-2, -1)) if energy is None else energy

    def narrow(self, nonzeros: int) -> None:
        """Let the next step leave every row so many coefficients; where these are fewer, it may get worse."""
        self._narrower, self.nonzeros = nonzeros < self.nonzeros, nonzeros

    def step(self, dictionary: Tensor, codes: Tensor, support: Tensor) -> SparseCode:
        """Supports and codes (..., n, k) for a dictionary (..., k, p) of atoms of norm 1; no row gets worse."""
        gram, products = dictionary @ dictionary.mT, self._target @ dictionary.mT
        return SparseCode(dictionary, *self.advance(gram, products, codes, support))

    def advance(self, gram: Tensor, products: Tensor, codes: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """As `step`, from D Dᵀ (..., k, k) and Y Dᵀ (..., n, k) in any metric, whose energy of Y was given."""
        before, proposed, refitted, after = self.tried(gram, products, codes)
        better = after > before
        if self._narrower:
            better, self._narrower = torch.ones_like(better), False
        else:
            self.length = torch.where(better, (self.length * STEP_GROWTH).clamp_max(STEP_LIMIT), self.length / 2)
        explained = torch.where(better, after, before).double().sum((-2, -1))
        self.error = (self._energy - explained).clamp_min(0)
        return torch.where(better, refitted, codes), torch.where(better, proposed, support)

    def tried(self, gram: Tensor, products: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every row explains of its energy, (..., n, 1); supports after a gradient step; codes refitted on them
        from those codes; and what these explain."""
        gradient = products - codes @ gram
        before = (codes * (products + gradient)).sum(-1, keepdim=True)
        proposed = largest(codes.addcmul(gradient, self.length), self.nonzeros)
        refitted, after = refit(gram, products, proposed, codes, self.refit_steps)
        return before, proposed, refitted, after


Solver = Callable[[Tensor, int, int, int, float], SparseCode]
SOLVERS: dict[str, Solver] = {"htp": htp, "procrustes": procrustes, "ksvd": ksvd}


def solve(
    target: Tensor,
    atoms: int,
    nonzeros: int,
    solver: str,
    rounds: int,
    tolerance: float = 0.0,
    kind: type[Pursuit] | None = None,
) -> SparseCode:
    """The code of target Y (..., n, p) by one of `SOLVERS`; it ends early where a round gains less than `tolerance`.

    htp pursues by a `kind` of Pursuit.
    """
    if solver == "htp":
        return htp(target, atoms, nonzeros, rounds, tolerance, kind)
    return SOLVERS[solver](target, atoms, nonzeros, rounds, tolerance)
