"""Steps of a pair of factors of W = B A (out, r) (r, in) that move W well, from the factors' gradients alone.

A step dB, dA moves W by dB A + B dA to first order. With G the full gradient, the factors' own are G Aᵀ and Bᵀ G.
LoRA-Pro (arXiv 2407.18242) picks the pair whose step in W is closest to G; it is the projection of G onto the tangent
space of the matrices of that rank, P_B G + (I - P_B) G P_A. A pivoted pair, W = [I; C] P (out - r, r) (r, in), spans
the same space without a choice to be made: of all pairs that make a step in W, one leaves the identity as it is.
"""

import torch
from torch import Tensor

from lrcompress.linalg.eigen import eigh
from lrcompress.linalg.whitening import noise
from lrcompress.precision import widened

DAMPING = 1e-8
"""Times the mean eigenvalue is added to a Gram before it is solved with; in float32 `noise`."""


def closest_step(left: Tensor, right: Tensor, left_grad: Tensor, right_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of left (m, r) and right (r, n) that make the step in W closest to the full gradient.

    Of all such pairs, that with right's the plain gradient in left's metric: (BᵀB)⁻¹ Bᵀ G.
    """
    right_step = solved(left.T @ left, right_grad)
    scaled = solved(right @ right.T, left_grad.T).T
    return scaled - left @ solved(left.T @ left, left.T @ scaled), right_step


def nearest_gauge(left: Tensor, right: Tensor, left_grad: Tensor, right_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs that make the closest step in W, the one nearest to the factors' own gradients.

    All of them are (dB - B X, dA + X A); BᵀB X + X AAᵀ = -(BᵀB)⁻¹ Bᵀ G Aᵀ gives this one.
    """
    left_step, right_step = closest_step(left, right, left_grad, right_grad)
    x = sylvester(left.T @ left, right @ right.T, -(right_step @ right.T))
    return left_step - left @ x, right_step + x @ right


def closest_pivoted_step(rest: Tensor, pivot: Tensor, rest_grad: Tensor, pivot_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of rest C (m - r, r) and pivot P (r, n) that make the step in W closest to the full gradient.

    The pivot rows of G Aᵀ, which no parameter has as its gradient, follow from Bᵀ G = pivot_grad.
    """
    rank = len(pivot)
    left, left_grad = unfolded(rest, pivot, rest_grad, pivot_grad)
    left_step, right_step = closest_step(left, pivot, left_grad, pivot_grad)
    x = left_step[:rank]
    return (left_step - left @ x)[rank:], right_step + x @ pivot


def unfolded(rest: Tensor, pivot: Tensor, rest_grad: Tensor, pivot_grad: Tensor) -> tuple[Tensor, Tensor]:
    """[I; C] (m, r) and the gradient G Aᵀ (m, r) that it would have as a factor without a fixed part."""
    left = torch.cat([torch.eye(len(pivot), dtype=rest.dtype, device=rest.device), rest])
    return left, torch.cat([pivot_grad @ pivot.T - rest.T @ rest_grad, rest_grad])


def scaled_step(
    left: Tensor, right: Tensor, left_grad: Tensor, right_grad: Tensor, *, pivoted: bool
) -> tuple[Tensor, Tensor]:
    """Each factor's gradient in the metric of the other: G Aᵀ (AAᵀ)⁻¹ and (BᵀB)⁻¹ Bᵀ G (arXiv 2402.02347)."""
    gram = left.T @ left
    if pivoted:
        gram = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return solved(right @ right.T, left_grad.T).T, solved(gram, right_grad)


def solved(gram: Tensor, rhs: Tensor) -> Tensor:
    """gram⁻¹ rhs (r, n) of a damped positive gram (r, r), in the wide dtype, in that of rhs."""
    lower = torch.linalg.cholesky(_damped(widened(gram)))
    return torch.cholesky_solve(widened(rhs), lower).to(rhs.dtype)


def sylvester(left: Tensor, right: Tensor, rhs: Tensor) -> Tensor:
    """X of left X + X right = rhs, all (r, r), left and right symmetric and positive, in the wide dtype."""
    lefts, u = eigh(_damped(widened(left)))
    rights, v = eigh(_damped(widened(right)))
    return (u @ ((u.T @ widened(rhs) @ v) / (lefts[:, None] + rights)) @ v.T).to(rhs.dtype)


def _damped(gram: Tensor) -> Tensor:
    mean = gram.diagonal().mean()
    shift = max(DAMPING, noise(gram)) * torch.where(mean > 0, mean, torch.ones_like(mean))
    return gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
