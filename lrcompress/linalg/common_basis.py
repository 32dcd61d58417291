"""Several low-rank matrices as combinations of few: principal components of the flattened matrices, from their factors.

As reversible model merging (RMM, arXiv 2510.14163) keeps them. Nothing of the size of a matrix is formed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompress.linalg.truncation import Spectrum, retruncate


def gram(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """(N, N) inner products of the matrices lefts[i] (m, r_i) @ rights[i] (r_i, n)."""
    rows = []
    for a, b in zip(lefts, rights, strict=True):
        rows.append(torch.stack([((a.T @ c) * (b @ d.T)).sum() for c, d in zip(lefts, rights, strict=True)]))
    found = torch.stack(rows)
    return (found + found.T) / 2


def common_basis(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> tuple[Tensor, list[Spectrum]]:
    """Coefficients U (N, N), orthogonal, and N orthogonal elements M_j, the largest first, with Δ_i = Σ_j U_ij M_j.

    lefts[i] (m, r_i) and rights[i] (r_i, n), float64. The first k elements span the subspace that is nearest to all
    matrices together (Frobenius). As U is orthogonal, whatever is left out of an element counts once: truncating every
    M_j to M'_j gives Σ_i ‖Δ_i - Σ_j U_ij M'_j‖² = Σ_j ‖M_j - M'_j‖², so the energies of all elements compare.
    """
    _, vectors = torch.linalg.eigh(gram(lefts, rights))
    coefficients = vectors.flip(1)
    stacked = torch.cat(list(rights))
    elements = []
    for weights in coefficients.T:
        scaled = torch.cat([w * left for w, left in zip(weights, lefts, strict=True)], dim=1)
        elements.append(retruncate(scaled, stacked))
    return coefficients, elements
