"""Eigenvectors of symmetric matrices, where devices may know none."""

from functools import cache

import torch
from torch import Tensor

from lrcompress.precision import exact


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), ascending, and vectors (..., n, n) of symmetric matrices (..., n, n), in their dtype.

    On the CPU, in float64, where the device does not know them: Apple's (torch 2.13).
    """
    if _known(matrix.device):
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    values, vectors = torch.linalg.eigh(exact(matrix))
    return values.to(matrix), vectors.to(matrix)


@cache
def _known(device: torch.device) -> bool:
    try:
        torch.linalg.eigh(torch.ones(1, 1, device=device))
    except NotImplementedError:
        return False
    return True
