"""The optimal low-rank approximation in a metric: decompose once, truncate to any rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.finite import all_finite
from lrcompress.grams import energy, quadratic
from lrcompress.linalg.eigen import eigh
from lrcompress.linalg.whitening import symmetric_root_and_inverse, upper_root
from lrcompress.precision import exact, widened

OVERSAMPLING, POWER_STEPS = 8, 2

SWEEPS, SEED = 5, 0
"""Of `leading`; each is one more power of the squared singular values."""

FEW = 8
"""A rank below this part of a weight's is looked for by `leading`."""

WELL_CONDITIONED = {torch.float64: 1e-4, torch.float32: 2e-2}
"""Smallest number on the diagonal of Cholesky's factor of Aᵀ A, over the largest, that leaves A T⁻¹ orthonormal:
about the fourth root of epsilon, for what rounding changes is epsilon over its square."""

CUT = torch.finfo(torch.float32).eps ** 0.5
"""Of the largest eigenvalue: vectors of smaller ones are found twice in float32. What rounding turns them by before
and after changes errors by about epsilon to the power 1.5 of it either way."""

FAITHFUL = 1e-3
"""Largest error of a unit vector that float32 may make: its square is what it costs, and bfloat16 rounds by 4e-3."""


@dataclass
class Spectrum:
    """An untruncated decomposition W = left @ right whose first r components are the best rank-r approximation.

    left: (m, k), right: (k, n), k = min(m, n), any float dtype.
    energies: (k,) `exact`, descending: component i contributes energies[i] to ‖L W R‖²; the squared error of rank r
    in the metric is the sum of the energies from r on.
    """

    left: Tensor
    right: Tensor
    energies: Tensor

    def errors(self) -> Tensor:
        """(k + 1,) `exact`: squared error in the metric at rank 0..k."""
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
    """Best approximations of W (m, n) under ‖Bᐟ² (W - W') Gᐟ²‖_F, for every rank at once.

    input_gram G (n, n) is the second moment of the inputs (identity if None), output_gram B (m, m) that of the
    output gradients (identity if None; damp it first where it may be singular). With P the leading left singular
    vectors of Bᐟ² W Gᐟ², the rank-r optimum is B⁻ᐟ² P_r P_rᵀ Bᐟ² W: the input side is never inverted, so a
    singular G does no harm. One-sided this is the output PCA of AFM and LoRD (arXiv 2309.14021) and equals
    SVD-LLM's whitened SVD; two-sided it is KFAC-SVD. Where m <= n, output_moment W G Wᵀ (m, m) serves instead of G.

    Eigenproblems and what they are made from are wide; without an output_gram the products of a float32 W with
    singular vectors stay float32 where that is FAITHFUL.
    """
    if not all_finite(weight):
        raise ArithmeticError("the weight has non-finite entries")
    if output_gram is None:
        scaled, unscale = weight if weight.dtype == torch.float32 else widened(weight), None
    else:
        root, unscale = symmetric_root_and_inverse(output_gram)
        scaled = root @ widened(weight)
    if len(weight) > weight.shape[1]:
        left, right, energies = _tall(scaled, input_gram)
    else:
        if output_moment is None:
            left, energies = _principal(widened(scaled), input_gram)
        else:
            moment = widened(output_moment)
            left, energies = _leading(moment if output_gram is None else root @ moment @ root)
        left = left.to(scaled.dtype)
        right = left.T @ scaled
    return Spectrum(left if unscale is None else unscale @ left, right, energies)


def leading(weight: Tensor, rank: int, input_gram: Tensor | None = None, output_gram: Tensor | None = None) -> Spectrum:
    """The first `rank` components of `decompose`, nearly, wide, by subspace iteration (arXiv 0909.4061).

    rank + OVERSAMPLING directions, begun at random, are multiplied SWEEPS times by W G Wᵀ, which is never formed.
    Energies that were not looked for are the mean of what is left of the whole, so that their sum is the error.
    """
    scaled, unscale = _finite(weight), None
    if output_gram is not None:
        root, unscale = symmetric_root_and_inverse(output_gram)
        scaled = root @ scaled
    m, n = scaled.shape
    width = min(rank + OVERSAMPLING, m, n)
    generator = torch.Generator().manual_seed(SEED)
    basis = torch.randn(m, width, dtype=torch.float64, generator=generator).to(scaled)
    rooted = scaled.dtype != torch.float64  # then no product is of the Gram itself: see `_principal`
    factor, gram = (factored(scaled, input_gram), None) if rooted else (scaled, input_gram)
    for _ in range(SWEEPS):
        rows = factor.T @ torch.linalg.qr(basis).Q
        rows = torch.linalg.qr(rows).Q if rooted else rows
        basis = factor @ (rows if gram is None else widened(gram) @ rows)
    basis = torch.linalg.qr(basis).Q
    core = basis.T @ scaled
    vectors, energies = _principal(basis.T @ factor if rooted else core, gram)
    found, count = energies[:rank], min(m, n)
    # Of large sums float32 knows seven digits, which is enough for what a report says is left.
    whole = energy(scaled.float(), input_gram)
    rest = ((whole - found.sum()) / max(count - rank, 1)).clamp_min(0).expand(count - len(found))
    left = basis @ vectors[:, :rank]
    return Spectrum(left if unscale is None else unscale @ left, vectors[:, :rank].T @ core, torch.cat([found, rest]))


def singular_values(weight: Tensor) -> Tensor:
    """(k,) `exact` of W (m, n), k = min(m, n), descending, those below 1e-8 of the largest not exactly.

    From the eigenvalues of the smaller Gram: a bidiagonal reduction takes ten times as long.
    """
    weight = widened(weight)
    flat = weight if weight.shape[0] <= weight.shape[1] else weight.T
    if weight.dtype != torch.float64:
        return _principal(flat)[1].sqrt()
    return torch.linalg.eigvalsh(quadratic(flat)).flip(0).clamp_min(0).sqrt()


def _tall(matrix: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors U (m, n) of A G^½, A (m, n) tall, Uᵀ A (n, n), and squared singular values (n,) `exact`.

    With A = Q T, T triangular, A G Aᵀ is Q (T G Tᵀ) Qᵀ: an eigenproblem of n, whose vectors V give U = Q V and
    Uᵀ A = Vᵀ T. T is Cholesky's factor of Aᵀ A and Q = A T⁻¹, or both are Householder's where A is nearly singular; no
    root of G is needed.
    """
    tall = widened(matrix)
    factor, failed = torch.linalg.cholesky_ex(quadratic(tall.T), upper=True)
    sizes, basis = factor.diagonal(), None
    if int(failed) or bool(sizes.min() < WELL_CONDITIONED[tall.dtype] * sizes.max()):
        basis, factor = torch.linalg.qr(tall)
    vectors, energies = _principal(factor, gram)
    right = (vectors.T @ factor).to(matrix.dtype)
    if basis is not None:
        return (basis @ vectors).to(matrix.dtype), right, energies
    turned = torch.linalg.solve_triangular(factor, vectors, upper=True)
    # What float32's rounding of ‖A‖ ‖z‖ makes of an image A z of length 1.
    error = torch.finfo(torch.float32).eps * float(factor.norm() * turned.norm(dim=0).max())
    single = matrix.dtype == torch.float32 and error <= FAITHFUL
    return matrix @ turned.float() if single else (tall @ turned).to(matrix.dtype), right, energies


def _principal(matrix: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvectors (m, m) of A G Aᵀ, A (m, n) wide, G (n, n) or the identity, and its `exact` eigenvalues, descending.

    In float32 what is above epsilon of the largest eigenvalue drowns, and a few tokens' outputs can be so large that
    half of all are below. So the factor F = A Rᵀ, Rᵀ R = G, is held, of which epsilon is the square of that: vectors of
    eigenvalues under CUT are found again among themselves, from the rows Uᵀ F.
    """
    if matrix.dtype == torch.float64:
        return _leading(quadratic(matrix, None if gram is None else gram.double()))
    factor = factored(matrix, gram)
    vectors = _leading(quadratic(factor))[0]
    rows = vectors.T @ factor
    sizes = rows.square().sum(1)
    first = int((sizes >= CUT * sizes.max()).sum())
    if first < len(rows):
        turn = _leading(quadratic(rows[first:]))[0]
        vectors = torch.cat([vectors[:, :first], vectors[:, first:] @ turn], dim=1)
        rows = torch.cat([rows[:first], turn.T @ rows[first:]])
    sizes, order = rows.square().sum(1).sort(descending=True)
    return vectors[:, order], exact(sizes)


def factored(matrix: Tensor, gram: Tensor | None) -> Tensor:
    """F (m, n) with F Fᵀ = A G Aᵀ, the identity if None."""
    return matrix if gram is None else matrix @ upper_root(gram).T


def _leading(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (m, m) and `exact` eigenvalues (m,) of a covariance, descending; those below zero count as zero."""
    values, vectors = eigh((covariance + covariance.T) / 2)
    return vectors.flip(1), exact(values).flip(0).clamp_min(0)


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
        u, s, vt = torch.linalg.svd(exact(core @ r_right.T), full_matrices=False)
        energies, rows, u = s**2, (s[:, None] * vt).to(q_right) @ q_right.T, u.to(basis)
    else:
        scaled = core @ right
        if scaled.dtype == torch.float64:
            u, energies = _leading(scaled @ input_gram.double() @ scaled.T)
        else:
            u, energies = _principal(scaled, input_gram)
        rows = u.T @ scaled
    basis = basis @ u
    return Spectrum(basis if unscale is None else unscale @ basis, rows, energies)


def randomised(left: Tensor, right: Tensor, rank: int, generator: torch.Generator) -> Spectrum:
    """The first `rank` components of `retruncate(left, right)`, nearly, in O((m + n) r rank) (arXiv 0909.4061).

    The product is sampled in rank + OVERSAMPLING directions, with POWER_STEPS orthonormalised subspace iterations.
    """
    left, right = _finite(left), _finite(right)
    width = min(rank + OVERSAMPLING, *left.shape, right.shape[1])
    sample = torch.randn(right.shape[1], width, dtype=torch.float64, generator=generator).to(left)
    basis = torch.linalg.qr(left @ (right @ sample)).Q
    for _ in range(POWER_STEPS):
        rows = torch.linalg.qr(right.T @ (left.T @ basis)).Q
        basis = torch.linalg.qr(left @ (right @ rows)).Q
    found = retruncate(basis, (basis.T @ left) @ right)
    return Spectrum(found.left[:, :rank], found.right[:rank], found.energies[:rank])


def product_energy(left: Tensor, right: Tensor) -> float:
    """‖left (m, r) @ right (r, n)‖², without the product."""
    left, right = widened(left), widened(right)
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0))


def _finite(matrix: Tensor) -> Tensor:
    if not all_finite(matrix):
        raise ArithmeticError("a factor has non-finite entries")
    return widened(matrix)
