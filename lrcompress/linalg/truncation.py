"""The optimal low-rank approximation in a metric: decompose once, truncate to any rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.linalg.whitening import symmetric_root, symmetric_root_and_inverse


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


def decompose(weight: Tensor, input_gram: Tensor | None = None, output_gram: Tensor | None = None) -> Spectrum:
    """Best approximations of W (m, n) under ‖Bᐟ² (W - W') Gᐟ²‖_F, for every rank at once, in float64.

    input_gram G (n, n) is the second moment of the inputs (identity if None), output_gram B (m, m) that of the
    output gradients (identity if None; damp it first where it may be singular). With P the leading left singular
    vectors of Bᐟ² W Gᐟ², the rank-r optimum is B⁻ᐟ² P_r P_rᵀ Bᐟ² W: the input side is never inverted, so a
    singular G does no harm. One-sided this is the output PCA of AFM and LoRD (arXiv 2309.14021) and equals
    SVD-LLM's whitened SVD; two-sided it is KFAC-SVD.
    """
    weight = weight.double()
    if not bool(torch.isfinite(weight).all()):
        raise ArithmeticError("the weight has non-finite entries")
    if output_gram is None:
        scaled, unscale = weight, None
    else:
        root, unscale = symmetric_root_and_inverse(output_gram)
        scaled = root @ weight
    basis, energies = _left_singular(scaled, input_gram)
    right = basis.T @ scaled
    left = basis if unscale is None else unscale @ basis
    return Spectrum(left, right, energies)


def _left_singular(matrix: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors (m, k) of matrix @ gram^½ and squared singular values (k,), descending."""
    m, n = matrix.shape
    if m <= n:
        covariance = matrix @ (matrix if gram is None else matrix @ gram.double()).T
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        return vectors.flip(1), values.flip(0).clamp_min(0)
    whitened = matrix if gram is None else matrix @ symmetric_root(gram)
    values, vectors = torch.linalg.eigh(whitened.T @ whitened)
    # The images of the right singular vectors are the left ones up to scale; Householder QR makes them orthonormal
    # also where a singular value is zero, and keeps the spans nested.
    basis = torch.linalg.qr(whitened @ vectors.flip(1)).Q
    return basis, values.flip(0).clamp_min(0)


def retruncate(left: Tensor, right: Tensor) -> Spectrum:
    """The SVD of left (m, r) @ right (r, n) from the r x r core, without forming the m x n product (LoRA-Squeeze)."""
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T)
    return Spectrum(q_left @ u, (s[:, None] * vt) @ q_right.T, s**2)
