"""Weights stacked and truncated together, with one right factor (Concatenated Matrix SVD, arXiv 2601.11626).

A weight is given by its right factor X_b (k_b, n), whose left factor has orthonormal columns in the metric of the
outputs: all errors are then those of the X_b in the metrics of their inputs' Grams G_b (n, n), identities where None.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.linalg.truncation import decompose, factored, tail_energies
from lrcompress.precision import exact, squares, widened

NEGLIGIBLE = 1e-9
"""Components of less than this share of the largest energy are left out: Grams are summed and kept in float32."""

SEEN = 1e-3
"""Share of a component's energy that a weight must have, beside the components before it, to tell it from those."""

RIDGES = (1e-11, 1e-9, 1e-7, 1e-5, 1e-3)
"""Tried in this order, relative to the mean of the diagonal."""


@dataclass
class Joint:
    """right R (k, n), its first r rows for rank r; errors[b] (k + 1,): squared error of weight b at rank 0..k.

    k is at most the rank of the stack in the metric.
    """

    right: Tensor
    errors: list[Tensor]
    _products: list[Tensor]
    _squares: list[Tensor]

    def spanned(self, b: int) -> int:
        """The largest rank at which the rows of weight b's left factor span all others': they can be everyone's."""
        own = torch.linalg.qr(self._products[b], mode="r").R.diagonal().square()
        energies = torch.stack([product.square().sum(0) for product in self._products]).sum(0)[: len(own)]
        told = own >= SEEN * energies
        return int(told.long().cumprod(0).sum())

    def left(self, b: int, rank: int) -> Tensor:
        """C (k_b, rank) with X_b ≈ C R: least squares in the metric of weight b."""
        square = self._squares[b][:rank, :rank]
        return torch.cholesky_solve(self._products[b][:, :rank].T, torch.linalg.cholesky(square)).T


def joint(rights: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Joint:
    """The right factor from all weights in the mean of their metrics, the left ones each in its own.

    Where the metrics are equal that is the best approximation of the stack for every rank. Where one is singular in
    directions that others see, its normal equations get a ridge; ArithmeticError where a large one is not enough.
    """
    present = [gram for gram in grams if gram is not None]
    mean = torch.stack([widened(gram) for gram in present]).mean(0) if present else None
    spectrum = decompose(torch.cat([widened(right) for right in rights]), mean)
    real = spectrum.energies > NEGLIGIBLE * spectrum.energies[:1]
    sizes = spectrum.energies[real].sqrt()
    right = spectrum.right[real] / sizes.to(spectrum.right)[:, None]
    errors, products, definite = [], [], []
    for own, gram in zip(rights, grams, strict=True):
        square, product, total = _products(widened(own), right, gram)
        square, factor = _definite(square)
        definite.append(square)
        products.append(product)
        # The Cholesky factor is nested, so its columns give what every further row of R adds.
        gains = exact(torch.linalg.solve_triangular(factor, products[-1].T, upper=False).square().sum(1))
        errors.append(torch.cat([total[None], total - gains.cumsum(0)]).clamp_min(0))
    return Joint(right, errors, products, definite)


def bounds(energies: Sequence[Tensor], ranks: int) -> tuple[Tensor, Tensor]:
    """(ranks + 1,) each: below and above the least squared error of the stack at rank 0..ranks, by its parts' energies.

    No part errs less than its own best approximation of that rank; and the pooled components are one of the stack.
    The lower one holds for parts with metrics of their own too.
    """
    lower = torch.stack([_padded(tail_energies(exact(values)), ranks) for values in energies]).sum(0)
    pooled = torch.cat([exact(values) for values in energies]).sort(descending=True).values
    return lower, _padded(tail_energies(pooled), ranks)


def estimate(
    rights: Sequence[Tensor], energies: Sequence[Tensor], gram: Tensor | None, keep: int, ranks: int
) -> tuple[Tensor, Tensor]:
    """`bounds`, nearer: from the first `keep` components of every part, which are stacked and decomposed.

    The rows of rights[b] are orthogonal in the metric, of squared length energies[b]. What is left out of a part is
    orthogonal to what is kept on both sides, so it adds at most its own energy; both bounds meet as `keep` grows.
    """
    stack = torch.cat([widened(right[:keep]) for right in rights])
    square = stack @ (stack if gram is None else stack @ widened(gram)).T
    values = torch.linalg.eigvalsh(exact(square + square.T) / 2).flip(0).clamp_min(0)
    lower = _padded(tail_energies(values), ranks)
    return lower, lower + sum(float(values[keep:].sum()) for values in energies)


def _products(own: Tensor, right: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """R G Rᵀ, X G Rᵀ and tr(X G Xᵀ) of wide X and R; in float32 from a factor of G, so that weak rows do not drown."""
    if own.dtype != torch.float64:
        own, right = factored(own, gram), factored(right, gram)
        return right @ right.T, own @ right.T, squares(own)
    seen = right if gram is None else right @ gram.double()
    return seen @ right.T, own @ seen.T, (own * (own if gram is None else own @ gram.double())).sum()


def _padded(errors: Tensor, ranks: int) -> Tensor:
    """The first ranks + 1 entries, zeros behind the last."""
    return torch.cat([errors, errors.new_zeros(max(0, ranks + 1 - len(errors)))])[: ranks + 1]


def _definite(square: Tensor) -> tuple[Tensor, Tensor]:
    """`square` with the smallest of the ridges that makes it positive definite, and its Cholesky factor."""
    square = (square + square.T) / 2
    size = square.diagonal().mean().clamp_min(torch.finfo(square.dtype).tiny)
    for ridge in (ridge for ridge in RIDGES if ridge > torch.finfo(square.dtype).eps / 2):
        found = square + ridge * size * torch.eye(len(square), dtype=square.dtype, device=square.device)
        factor, failed = torch.linalg.cholesky_ex(found)
        if not int(failed):
            return found, factor
    raise ArithmeticError("the Gram of the inputs is not positive semidefinite")
