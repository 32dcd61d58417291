"""How many bits, and how much error, rounding with a step will take: predicted without rounding the weight."""

import math

import torch
from torch import Tensor

from lrcompress.linalg.triangular import inverse_column_norms
from lrcompress.linalg.two_sided import expected_at, offsets
from lrcompress.precision import exact

COARSEST, FINEST = 3, 13
"""Octaves of the steps that are tried above and below the entries' root mean square."""

FINE = 5.0
"""Bits from which an octave of the step is one bit and four times the error."""

PER_OCTAVE = 4
SAMPLED = 2**14
"""Entries that stand for all."""

ROUNDS = 12
"""Until the error that feedback carries is that which rounding leaves, at most."""

CLASSES = 2
"""Of predicted size, an octave, as the coder has them (coding/stream.py)."""


def rates_of(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(3, steps) `exact`: bits an entry, strictly decreasing, log2 of the step, and the summed squared error.

    target (m, n), left (m, m) and right (n, n) as of `round_two_sided`, in steps of 1. What feedback adds to an entry
    before it is rounded is E - T with E = N⁻ᵀ T M⁻¹; T is about white, so that its variance is that of T times the
    squared norms of a column of N⁻¹ and of M⁻¹, less one. Sampled entries get normal noise of that variance.
    """
    row, column = _sampled(target)
    return _rates(target, row, column, inverse_column_norms(left)[row] * inverse_column_norms(right)[column])


def rates_by_row(target: Tensor, right: Tensor, group: Tensor) -> Tensor:
    """`rates_of` rows that are rounded by themselves, row v with the factor right[group[v]] of right (groups, n, n)."""
    row, column = _sampled(target)
    amplification = torch.stack([inverse_column_norms(factor) for factor in right])
    return _rates(target, row, column, amplification[group[row], column])


def _sampled(target: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of SAMPLED entries, drawn evenly, of all where there are no more."""
    m, n = target.shape
    if m * n > SAMPLED:
        place = torch.randint(m * n, (SAMPLED,), generator=torch.Generator().manual_seed(0))
    else:
        place = torch.arange(m * n)
    place = place.to(target.device)
    return place // n, place % n


def _rates(target: Tensor, row: Tensor, column: Tensor, amplification: Tensor) -> Tensor:
    """`rates_of`, from the entries at row (count,) and column (count,), E's variance over T's at each of them."""
    scale = float(target.square().mean().sqrt())
    if scale == 0:
        scale = 1.0
    generator = torch.Generator().manual_seed(1)
    values = exact(target[row, column])
    drawn = torch.randn(len(row), generator=generator, dtype=torch.float64).to(values.device)
    spread = (exact(amplification) - 1).clamp_min(0).sqrt() * drawn
    expected = exact(expected_at(target, row, column))
    classes = (expected.clamp_min(1e-9).log2() * CLASSES).round().long()
    classes -= classes.min()
    found: list[tuple[float, float, float]] = []
    for part in range(COARSEST * PER_OCTAVE, -FINEST * PER_OCTAVE - 1, -1):
        step = scale * 2.0 ** (part / PER_OCTAVE)
        if found and found[-1][0] > FINE:  # too many codes for the sample, and all as in the limit of small steps
            bits, error = found[-1][0] + 1 / PER_OCTAVE, found[-1][2] / 4 ** (1 / PER_OCTAVE)
        else:
            codes, squared = _settled(values / step, spread, offsets(expected / step))
            bits, error = _entropy(codes.long(), classes), squared * step**2 * target.numel()
        if found and bits <= found[-1][0]:  # sampled zeros alone
            bits = found[-1][0] + 1e-9
        found.append((bits, math.log2(step), error))
    return torch.tensor(found[::-1], dtype=torch.float64).T.contiguous()


def _settled(values: Tensor, spread: Tensor, cut: Tensor) -> tuple[Tensor, float]:
    """Codes of the sampled entries, and the mean squared error that both rounding leaves and feedback carries."""
    error = 1 / 12
    for _ in range(ROUNDS):
        moved = values + error**0.5 * spread
        codes = (moved.abs() + cut).floor().copysign(moved)
        before, error = error, float((codes - moved).square().mean())
        if abs(error - before) < 0.01 * before:
            break
    return codes, error


def _entropy(codes: Tensor, classes: Tensor) -> float:
    """Bits a code of order-0 tables, one a class."""
    low, count = int(codes.min()), int(codes.max()) - int(codes.min()) + 1
    table = torch.bincount(classes * count + codes - low, minlength=(int(classes.max()) + 1) * count)
    table = table.reshape(-1, count).double()
    shares = table / table.sum(1, keepdim=True).clamp_min(1)
    return float(-(table * shares.clamp_min(1e-300).log2()).sum()) / codes.numel()
