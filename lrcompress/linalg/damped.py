"""Cholesky's factor of a Gram that is singular, or that rounding leaves indefinite."""

import torch
from torch import Tensor

from lrcompress.finite import all_finite
from lrcompress.linalg.whitening import check_gram, noise
from lrcompress.precision import wide, widened

ENOUGH = 0.01
"""Of the damping: what rounding to float32 may change of a Gram's eigenvalues."""

STRIP = 512
"""Rows that are put in order at a time."""


def damped_factor(
    gram: Tensor,
    damping: float,
    what: str,
    order: Tensor | None = None,
    *,
    single: bool = False,
) -> Tensor:
    """V (n, n), upper triangular, wide, with V Vᵀ = gram (n, n) in `order` (n,) + damping * its mean diagonal * I.

    `single`: float32 where that changes the sum by little beside the damping (`ENOUGH`). An all-zero gram counts as the
    identity; damping is at least `noise`, and grows tenfold while rounding leaves the sum indefinite.
    ArithmeticError, which names `what`, where gram has non-finite entries or is not positive semidefinite.
    """
    check_gram(gram, what)
    if not bool((gram.diagonal() > 0).any()):
        gram = torch.eye(len(gram), dtype=wide(gram.device), device=gram.device)
    # Cholesky's factor of the matrix turned round, turned back, is upper triangular.
    turned = torch.arange(len(gram), device=gram.device).flip(0) if order is None else order.flip(0)
    mean, damping = float(widened(gram.diagonal()).mean()), max(damping, noise(gram))
    dtypes = dict.fromkeys([torch.float32] * single + [wide(gram.device)])
    while damping <= 1:
        for dtype in dtypes:
            lower = _cholesky(gram, turned, damping * mean, dtype)
            if lower is not None:
                return lower.flip(0, 1)
        damping *= 10
    raise ArithmeticError(f"the Gram of {what} is not positive semidefinite")


def _cholesky(gram: Tensor, order: Tensor, added: float, dtype: torch.dtype) -> Tensor | None:
    """Cholesky's factor L (n, n) of gram (n, n), its rows and columns in `order`, plus `added` I; None where none is.

    Nor in float32 where the root mean square of the eigenvalues of what that misses is not small beside `added`: that
    is what a normal vector is multiplied by.
    """
    lower, failed = torch.linalg.cholesky_ex(_ordered(gram, order, added, dtype))
    if int(failed) or not all_finite(lower):
        return None
    exact = dtype == wide(gram.device) or _missed(lower, gram, order, added) <= ENOUGH * added
    return lower if exact else None


def _missed(lower: Tensor, gram: Tensor, order: Tensor, added: float) -> float:
    """What a normal vector is multiplied by, in the root mean square, by the difference of both sides."""
    probe = torch.randn(len(gram), generator=torch.Generator().manual_seed(0)).to(lower)
    placed = torch.empty_like(probe, dtype=gram.dtype)
    placed[order] = probe.to(gram.dtype)
    exact = (gram @ placed)[order] + added * probe
    return float((exact - lower @ (lower.T @ probe)).norm()) / len(gram) ** 0.5


def _ordered(gram: Tensor, order: Tensor, added: float, dtype: torch.dtype) -> Tensor:
    """gram (n, n) in `dtype`, its rows and columns in `order`, plus `added` I; a strip at a time, for gram is large."""
    found = torch.empty(gram.shape, dtype=dtype, device=gram.device)
    for start in range(0, len(gram), STRIP):
        found[start : start + STRIP] = gram[order[start : start + STRIP]][:, order]
    found.diagonal().add_(added)
    return found
