"""Square roots of Grams."""

import torch
from torch import Tensor

from lrcompress.finite import all_finite
from lrcompress.linalg.eigen import eigh
from lrcompress.precision import wide, widened

RELATIVE_FLOOR = 1e-12
"""Eigenvalues below this fraction of the largest are noise of the sums, not signal; see `noise` for float32."""


def check_gram(gram: Tensor, what: str) -> None:
    """ArithmeticError where a Gram has a non-finite entry: it comes from non-finite activations."""
    if not all_finite(gram):
        raise ArithmeticError(f"the Gram of {what} has non-finite entries: activations overflowed")


def noise(gram: Tensor) -> float:
    """The part of its trace that rounding of a Gram (n, n) makes of eigenvalues: nothing that counts in float64."""
    return 0.0 if wide(gram.device) == torch.float64 else len(gram) * torch.finfo(torch.float32).eps


def damped(gram: Tensor, damping: float) -> Tensor:
    """gram (n, n) plus `damping`, or `noise`, times its mean eigenvalue on the diagonal, wide."""
    found = widened(gram).clone()
    diagonal = found.diagonal()
    diagonal += max(damping, noise(gram)) * diagonal.mean()
    return found


def symmetric_root(gram: Tensor) -> Tensor:
    """R (n, n), symmetric positive semidefinite, with R R = gram; eigenvalues below zero count as zero."""
    values, vectors = eigh(widened(gram))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def upper_root(gram: Tensor) -> Tensor:
    """R (n, n) wide with Rᵀ R = gram: Cholesky's factor, or the symmetric root where rounding made gram indefinite.

    A Gram of few rows that was kept in float32 has eigenvalues a little below zero; they count as zero. Where the wide
    dtype is float32 a part of the diagonal is added instead, epsilon or ten times as much until the rest is definite:
    of every input its own, so that one that is huge does not drown the others.
    """
    gram = widened(gram)
    if gram.dtype == torch.float64:
        factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
        return symmetric_root(gram) if int(failed) else factor
    sizes = gram.diagonal().clamp_min(0).sqrt()
    safe = torch.where(sizes > 0, sizes, torch.ones_like(sizes))
    unit, added = gram / safe[:, None] / safe, torch.finfo(gram.dtype).eps
    while added < 1:
        lifted = unit.clone()
        lifted.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(lifted, upper=True)
        if not int(failed):
            return factor * sizes
        added *= 10
    raise ArithmeticError("a Gram is not positive semidefinite")


def symmetric_root_and_inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁻¹ (n, n) with R R = gram; an all-zero gram gives identities.

    Eigenvalues are floored at RELATIVE_FLOOR, or `noise`.
    """
    values, vectors = eigh(widened(gram))
    if values[-1] <= 0:
        identity = torch.eye(len(gram), dtype=wide(gram.device), device=gram.device)
        return identity, identity
    values = values.clamp_min(float(values[-1]) * max(RELATIVE_FLOOR, noise(gram)))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def aimed(weight: Tensor, gram: Tensor, drift: Tensor, share: float, damping: float) -> Tensor:
    """W (m, n) moved so that on inputs x̂ it comes near to (1 - share) W x̂ + share W x, wide.

    gram G = E[x̂ x̂ᵀ] and drift D = E[(x - x̂) x̂ᵀ] (n, n) of paired inputs give the ridge regression
    W + share W D (G + damping * mean eigenvalue)⁻¹ (MPIFA, arXiv 2501.19090; AA-SVD, 2604.02119).
    """
    weight = widened(weight)
    factor, failed = torch.linalg.cholesky_ex(damped(gram, damping))
    if int(failed):
        raise ArithmeticError("the Gram of the inputs is not positive semidefinite")
    return weight + share * torch.cholesky_solve((weight @ widened(drift)).T, factor).T
