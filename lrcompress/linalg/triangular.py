"""Norms and products that make use of a triangle's zeros: by panels, nearly all of it matrix products."""

import torch
from torch import Tensor

from lrcompress.precision import exact, wide

PANEL, BLOCK = 512, 256
"""Columns that are worked on at a time, and rows that are solved for at a time."""


def inverse_column_norms(factor: Tensor, panel: int = PANEL, block: int = BLOCK) -> Tensor:
    """(n,) squared norms of the columns of the inverse of a unit upper triangular factor (n, n).

    Back substitution, a panel of columns after another: the inverse as a whole is never held.
    """
    norms = torch.empty_like(factor[0])
    for start in range(0, len(factor), panel):
        stop = min(start + panel, len(factor))
        inverse = torch.zeros_like(factor[:stop, start:stop])
        inverse[start:].fill_diagonal_(1)
        for end in range(stop, 0, -block):
            begin = max(end - block, 0)
            rows, corner = inverse[begin:end], factor[begin:end, begin:end]
            rows -= factor[begin:end, end:stop] @ inverse[end:]
            rows.copy_(torch.linalg.solve_triangular(corner, rows, upper=True, unitriangular=True))
        norms[start:stop] = inverse.square_().sum(0)
    return norms


def energy_between(left: Tensor, matrix: Tensor, right: Tensor, panel: int = PANEL) -> Tensor:
    """|Nᵀ X M|² (), `exact`, of X (m, n) between upper triangular left N (m, m) and right M (n, n)."""
    dtype = wide(matrix.device)
    total = torch.zeros((), dtype=dtype, device=matrix.device)
    for start in range(0, len(left), panel):
        stop = min(start + panel, len(left))
        rows = left[:stop, start:stop].T @ matrix[:stop]
        for first in range(0, len(right), panel):
            last = min(first + panel, len(right))
            total += (rows[:, :last] @ right[:last, first:last]).square_().sum(dtype=dtype)
    return exact(total)
