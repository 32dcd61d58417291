"""Choosing rows that span the others."""

import scipy.linalg
import torch
from torch import Tensor


def pivot_rows(basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `basis` (m, r) that span all of them, and the coefficients of the others.

    Returns pivots (r,) and others (m - r,), both ascending, and C (m - r, r) with basis[others] = C basis[pivots].
    Columns are orthonormalised first, so C depends on their span alone and a badly scaled basis does no harm;
    the pivots come from a QR decomposition with column pivoting of the transpose (PIFA, arXiv 2501.19090).
    """
    rank = basis.shape[1]
    orthonormal = torch.linalg.qr(basis.double()).Q
    order = scipy.linalg.qr(orthonormal.T.cpu().numpy(), mode="r", pivoting=True)[-1]
    chosen = torch.zeros(basis.shape[0], dtype=torch.bool)
    chosen[torch.from_numpy(order[:rank].copy()).long()] = True
    pivots = chosen.nonzero().flatten().to(basis.device)
    others = (~chosen).nonzero().flatten().to(basis.device)
    coefficients = torch.linalg.solve(orthonormal[pivots], orthonormal[others], left=False)
    return pivots, others, coefficients.to(basis.dtype)
