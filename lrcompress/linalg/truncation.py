"""The optimal low-rank approximation in a metric: decompose once, truncate to any rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.finite import all_finite
from lrcompress.linalg.whitening import symmetric_root_and_inverse, upper_root

OVERSAMPLING, POWER_STEPS = 8, 2

WELL_APART = 1e-9
"""Squared singular values above this fraction of the largest have vectors that rounding leaves orthogonal to 1e-7."""

ORTHOGONAL = 1e-7
"""Products of two unit vectors that count as orthogonal."""


@dataclass
class Spectrum:
    """An untruncated decomposition W = left @ right whose first r components are the best rank-r approximation.

    left: (m, k), right: (k, n), k = min(m, n), any float dtype.
    energies: (k,) float64, descending: component i contributes energies[i] to ‖L W R‖²; the squared error of rank r
    in the metric is the sum of the energies from r on.
    """

    left: Tensor
    right: Tensor
    energies: Tensor

    def errors(self) -> Tensor:
        """(k + 1,) float64: squared error in the metric at rank 0..k."""
        return tail_energies(self.energies)


def tail_energies(energies: Tensor) -> Tensor:
    """(k + 1,) sums of the energies (k,) from 0..k on: what a truncation to rank 0..k discards."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def decompose(
    weight: Tensor,
    input_gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    *,
    output_moment: Tensor | None = None,
) -> Spectrum:
    """Best approximations of W (m, n) under ‖Bᐟ² (W - W') Gᐟ²‖_F, for every rank at once, in float64.

    input_gram G (n, n) is the second moment of the inputs (identity if None), output_gram B (m, m) that of the
    output gradients (identity if None; damp it first where it may be singular). With P the leading left singular
    vectors of Bᐟ² W Gᐟ², the rank-r optimum is B⁻ᐟ² P_r P_rᵀ Bᐟ² W: the input side is never inverted, so a
    singular G does no harm. One-sided this is the output PCA of AFM and LoRD (arXiv 2309.14021) and equals
    SVD-LLM's whitened SVD; two-sided it is KFAC-SVD. Where m <= n, output_moment W G Wᵀ (m, m) serves instead of G.
    """
    weight = weight.double()
    if not all_finite(weight):
        raise ArithmeticError("the weight has non-finite entries")
    if output_gram is None:
        scaled, unscale = weight, None
    else:
        root, unscale = symmetric_root_and_inverse(output_gram)
        scaled = root @ weight
    if output_moment is None:
        basis, energies = _left_singular(scaled, input_gram)
    else:
        moment = output_moment.double()
        basis, energies = _leading(moment if output_gram is None else root @ moment @ root)
    right = basis.T @ scaled
    left = basis if unscale is None else unscale @ basis
    return Spectrum(left, right, energies)


def _left_singular(matrix: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors (m, k) of matrix @ gram^½ and squared singular values (k,), descending."""
    m, n = matrix.shape
    if m <= n:
        return _leading(matrix @ (matrix if gram is None else matrix @ gram.double()).T)
    whitened = matrix if gram is None else matrix @ upper_root(gram).T
    values, vectors = torch.linalg.eigh(whitened.T @ whitened)
    values = values.flip(0).clamp_min(0)
    images = whitened @ vectors.flip(1)
    return _orthonormal(images, values), values


def _orthonormal(images: Tensor, values: Tensor) -> Tensor:
    """Left singular vectors (m, k) from the `images` of the right ones, each a singular value long, in their place.

    Where those are nearly zero their images are not orthogonal any more: QR of what is left of the last ones beside the
    others makes them so, or of all of them where that is nothing but rounding; both keep the leading spans.
    """
    well = int((values > WELL_APART * values[0]).sum())
    if 2 * well < len(values):
        return torch.linalg.qr(images).Q
    basis, rest = images[:, :well].div_(values[:well].sqrt()), images[:, well:]
    if not rest.numel():
        return images
    for _ in range(2):
        rest.copy_(torch.linalg.qr(rest - basis @ (basis.T @ rest)).Q)
    if float((basis.T @ rest).abs().max()) > ORTHOGONAL:
        return torch.linalg.qr(images).Q
    return images


def _leading(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (m, m) and eigenvalues (m,) of a covariance, descending; those below zero count as zero."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors.flip(1), values.flip(0).clamp_min(0)


def retruncate(
    left: Tensor, right: Tensor, input_gram: Tensor | None = None, output_gram: Tensor | None = None
) -> Spectrum:
    """`decompose` of left (m, r) @ right (r, n), from its r x r core: the m x n product is not formed (LoRA-Squeeze).

    Without Grams it is the SVD, all of it to full precision.
    """
    left, right = _finite(left), _finite(right)
    unscale = None
    if output_gram is not None:
        root, unscale = symmetric_root_and_inverse(output_gram)
        left = root @ left
    basis, core = torch.linalg.qr(left)
    if input_gram is None:
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, vt = torch.linalg.svd(core @ r_right.T, full_matrices=False)
        energies, rows = s**2, (s[:, None] * vt) @ q_right.T
    else:
        scaled = core @ right
        covariance = scaled @ input_gram.double() @ scaled.T
        values, u = torch.linalg.eigh((covariance + covariance.T) / 2)
        energies, u = values.flip(0).clamp_min(0), u.flip(1)
        rows = u.T @ scaled
    basis = basis @ u
    return Spectrum(basis if unscale is None else unscale @ basis, rows, energies)


def randomised(left: Tensor, right: Tensor, rank: int, generator: torch.Generator) -> Spectrum:
    """The first `rank` components of `retruncate(left, right)`, nearly, in O((m + n) r rank) (arXiv 0909.4061).

    The product is sampled in rank + OVERSAMPLING directions, with POWER_STEPS orthonormalised subspace iterations.
    """
    left, right = _finite(left), _finite(right)
    width = min(rank + OVERSAMPLING, *left.shape, right.shape[1])
    sample = torch.randn(right.shape[1], width, dtype=torch.float64, generator=generator).to(left.device)
    basis = torch.linalg.qr(left @ (right @ sample)).Q
    for _ in range(POWER_STEPS):
        rows = torch.linalg.qr(right.T @ (left.T @ basis)).Q
        basis = torch.linalg.qr(left @ (right @ rows)).Q
    found = retruncate(basis, (basis.T @ left) @ right)
    return Spectrum(found.left[:, :rank], found.right[:rank], found.energies[:rank])


def product_energy(left: Tensor, right: Tensor) -> float:
    """‖left (m, r) @ right (r, n)‖², without the product."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0))


def _finite(matrix: Tensor) -> Tensor:
    if not all_finite(matrix):
        raise ArithmeticError("a factor has non-finite entries")
    return matrix.double()
