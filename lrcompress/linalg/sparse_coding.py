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
    stalled,
)
from lrcompress.linalg.ksvd import ksvd
from lrcompress.linalg.pursuit import Alternation
from lrcompress.precision import squares

RELAXATION = 1.98
"""A dictionary step goes this many times as far as the least-squares dictionary. The error for given codes is a
parabola along that line, so below 2 it still falls; measured, the alternation needs a third of the rounds."""

WIDE = 1.35
"""The first round of htp keeps so many times the coefficients."""

MOMENTUM = 0.25
"""Share of its last step by which a dictionary goes on. With both, 15 rounds leave the demo's weights 0.94 to 1 times
the error of 24 rounds without."""

LAST_STEPS = 4
"""Conjugate gradient steps at the end of `htp`."""


def procrustes(target: Tensor, atoms: int, nonzeros: int, turns: Alternation) -> SparseCode:
    """Orthonormal dictionary and hard threshold in turn (COMPOT, 2602.15200); atoms <= min(n, p).

    Begins at the leading singular vectors; C = H_s(Y Dᵀ) is optimal for an orthonormal D, D = polar(Cᵀ Y) for C.
    """
    check_finite(target)
    dictionary = leading_directions(target, atoms)
    energy = squares(target)
    objectives: list[Tensor] = []
    for step in range(turns.rounds + 1):
        codes = target @ dictionary.mT
        support = largest(codes, nonzeros)
        codes = codes * support
        objectives.append((energy - squares(codes)).clamp_min(0))
        if stalled(objectives, turns.tolerance):
            break
        if step < turns.rounds:
            dictionary = polar(codes.mT @ target)
    return SparseCode(dictionary, codes, support, objectives)


def htp(target: Tensor, atoms: int, nonzeros: int, turns: Alternation) -> SparseCode:
    """Free dictionary and hard thresholding pursuit in turn, begun at the leading singular vectors; atoms <= n.

    As in GeoPair: D by least squares, here over-relaxed, then supports from a gradient step and coefficients
    refitted on them by least squares. The first round keeps more coefficients; objectives are those since a row has its
    `nonzeros`. No round raises them: what momentum makes worse is not kept.
    """
    check_finite(target)
    first = min(atoms, *target.shape[-2:])
    wide = min(round(WIDE * nonzeros), atoms) if turns.rounds > 1 else nonzeros
    start = procrustes(target, first, min(wide, first), Alternation(0))
    objectives = start.objectives if wide == nonzeros else []
    code = _widened(target, start, atoms, wide)
    pursuit, previous = turns.pursuit(target)(target, wide), code.dictionary
    for step in range(turns.rounds):
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
        if stalled(objectives, turns.tolerance) and not bool(worse.any()):
            break
    if turns.rounds:
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


Solver = Callable[[Tensor, int, int, Alternation], SparseCode]
SOLVERS: dict[str, Solver] = {"htp": htp, "procrustes": procrustes, "ksvd": ksvd}
"""Of a target Y (..., n, p): atoms, coefficients of every row of C, and how both take turns."""
