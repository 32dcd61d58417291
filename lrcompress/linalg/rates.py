"""How many bits, and how much error, rounding with a step will take: predicted without rounding the weight."""

import math

import torch
from torch import Tensor

from lrcompress.linalg.two_sided import expected_sizes, offsets

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
    """(3, steps) float64: bits an entry, strictly decreasing, log2 of the step, and the summed squared error.

    target (m, n), left (m, m) and right (n, n) as of `round_two_sided`, in steps of 1. What feedback adds to an entry
    before it is rounded is E - T with E = N⁻ᵀ T M⁻¹; T is about white, so that its variance is that of T times the
    squared norms of a column of N⁻¹ and of M⁻¹, less one. Sampled entries get normal noise of that variance.
    """
    device, (m, n) = target.device, target.shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.outer(_amplification(left), _amplification(right)).sub_(1).clamp_min_(0).sqrt_()
    scale = float(target.square().mean().sqrt())
    if scale == 0:
        scale = 1.0
    count = min(SAMPLED, m * n)
    place = torch.randperm(m * n, generator=generator)[:count].to(device) if count < m * n else torch.arange(m * n)
    drawn = torch.randn(count, generator=generator, dtype=torch.float64).to(device)
    expected = expected_sizes(target).flatten()[place].double()
    values, spread = target.flatten()[place].double(), noise.flatten()[place].double() * drawn
    classes = (expected.clamp_min(1e-9).log2() * CLASSES).round().long()
    classes -= classes.min()
    found: list[tuple[float, float, float]] = []
    for part in range(COARSEST * PER_OCTAVE, -FINEST * PER_OCTAVE - 1, -1):
        step = scale * 2.0 ** (part / PER_OCTAVE)
        if found and found[-1][0] > FINE:  # too many codes for the sample, and all as in the limit of small steps
            bits, error = found[-1][0] + 1 / PER_OCTAVE, found[-1][2] / 4 ** (1 / PER_OCTAVE)
        else:
            codes, squared = _settled(values / step, spread, offsets(expected / step))
            bits, error = _entropy(codes.long(), classes), squared * step**2 * m * n
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


def _amplification(factor: Tensor) -> Tensor:
    """(n,) squared norms of the columns of the inverse of a unit upper triangular factor (n, n)."""
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=True, unitriangular=True)
    return inverse.square().sum(0)


def _entropy(codes: Tensor, classes: Tensor) -> float:
    """Bits a code of order-0 tables, one a class."""
    low, count = int(codes.min()), int(codes.max()) - int(codes.min()) + 1
    table = torch.bincount(classes * count + codes - low, minlength=(int(classes.max()) + 1) * count)
    table = table.reshape(-1, count).double()
    shares = table / table.sum(1, keepdim=True).clamp_min(1)
    return float(-(table * shares.clamp_min(1e-300).log2()).sum()) / codes.numel()
