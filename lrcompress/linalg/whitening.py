"""Square roots of Grams."""

import torch
from torch import Tensor

from lrcompress.finite import all_finite

# Eigenvalues below this fraction of the largest are noise of the sums, not signal.
RELATIVE_FLOOR = 1e-12


def check_gram(gram: Tensor, what: str) -> None:
    """ArithmeticError where a Gram has a non-finite entry: it comes from non-finite activations."""
    if not all_finite(gram):
        raise ArithmeticError(f"the Gram of {what} has non-finite entries: activations overflowed")


def damped(gram: Tensor, damping: float) -> Tensor:
    """gram (n, n) plus `damping` times its mean eigenvalue on the diagonal, float64."""
    found = gram.double().clone()
    diagonal = found.diagonal()
    diagonal += damping * diagonal.mean()
    return found


def symmetric_root(gram: Tensor) -> Tensor:
    """R (n, n), symmetric positive semidefinite, with R R = gram; eigenvalues below zero count as zero."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def upper_root(gram: Tensor) -> Tensor:
    """R (n, n) float64 with Rᵀ R = gram: Cholesky's factor, or the symmetric root where rounding made gram indefinite.

    A Gram of few rows that was kept in float32 has eigenvalues a little below zero; they count as zero.
    """
    factor, failed = torch.linalg.cholesky_ex(gram.double(), upper=True)
    return symmetric_root(gram) if int(failed) else factor


def symmetric_root_and_inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁻¹ (n, n) with R R = gram, eigenvalues floored at a relative 1e-12; an all-zero gram gives identities."""
    values, vectors = torch.linalg.eigh(gram.double())
    if values[-1] <= 0:
        identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        return identity, identity
    values = values.clamp_min(float(values[-1]) * RELATIVE_FLOOR)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def aimed(weight: Tensor, gram: Tensor, drift: Tensor, share: float, damping: float) -> Tensor:
    """W (m, n) moved so that on inputs x̂ it comes near to (1 - share) W x̂ + share W x, float64.

    gram G = E[x̂ x̂ᵀ] and drift D = E[(x - x̂) x̂ᵀ] (n, n) of paired inputs give the ridge regression
    W + share W D (G + damping * mean eigenvalue)⁻¹ (MPIFA, arXiv 2501.19090; AA-SVD, 2604.02119).
    """
    weight = weight.double()
    factor, failed = torch.linalg.cholesky_ex(damped(gram, damping))
    if int(failed):
        raise ArithmeticError("the Gram of the inputs is not positive semidefinite")
    return weight + share * torch.cholesky_solve((weight @ drift.double()).T, factor).T
