"""Grids of few levels: asymmetric ones for groups of a weight, symmetric ones for the components of two factors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.precision import widened

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Fractions of a range that a search for the best one tries."""


@dataclass
class Grid:
    """The numbers scale * (code - zero) with codes 0..2^bits - 1; scale and zero (..., 1), wide."""

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, values: Tensor) -> Tensor:
        """Codes (..., n) of the grid's numbers nearest to `values` (..., n), wide."""
        return ((values / self.scale).round() + self.zero).clamp(0, 2**self.bits - 1)

    def numbers(self, codes: Tensor) -> Tensor:
        """The grid's numbers (..., n) of `codes`."""
        return (codes - self.zero) * self.scale

    def rounded(self, values: Tensor) -> Tensor:
        """The grid's numbers nearest to `values` (..., n)."""
        return self.numbers(self.codes(values))


def storable(scale: Tensor) -> Tensor:
    """scale rounded to bfloat16: a checkpoint of any dtype then holds it exactly (float16 within its range)."""
    return widened(scale.to(torch.bfloat16))


def asymmetric_grid(values: Tensor, bits: int, clip: float | Tensor = 1.0) -> Grid:
    """A grid over `clip` times the range of values (..., n) that contains zero; rows of zeros get a scale of 1."""
    low = values.amin(-1, keepdim=True).clamp_max(0) * clip
    high = values.amax(-1, keepdim=True).clamp_min(0) * clip
    scale = storable((high - low) / (2**bits - 1))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Grid(scale, (-low / scale).round().clamp(0, 2**bits - 1), bits)


def best_grid(values: Tensor, bits: int, importance: Tensor | None = None) -> Grid:
    """The asymmetric grid over a fraction of the range with the least squared error, weighted by importance (n,)."""
    best_error = torch.full_like(values[..., :1], torch.inf)
    best_clip = torch.ones_like(best_error)
    for clip in CLIPS:
        error = (asymmetric_grid(values, bits, clip).rounded(values) - values) ** 2
        error = (error if importance is None else error * importance).sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_clip = torch.where(better, error, best_error), best_clip.masked_fill(better, clip)
    return asymmetric_grid(values, bits, best_clip)


def symmetric_codes(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Signed codes (k, n) below 2^(bits-1) and scales (k, 1), rows ≈ codes * scale, least squared error per row.

    The scale is the best of several clipped ranges; rows of zeros get zero codes and a scale of 1.
    """
    top = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    best_error = torch.full_like(largest, torch.inf)
    best_scale = largest / top
    for clip in CLIPS:
        scale = largest * clip / top
        error = ((rows / scale).round().clamp(-top, top) * scale - rows).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    return (rows / best_scale).round().clamp(-top, top), best_scale
