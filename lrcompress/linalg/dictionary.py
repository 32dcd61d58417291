"""The two halves of Y ≈ C D, a dense dictionary and sparse codes: each by least squares for the other.

The papers write W_w = D S with the output channels as columns; here everything is transposed, as torch stores a
weight: target Y (n, p) with the n output channels as rows, dictionary D (k, p) with the atoms as rows, codes C (n, k).
All functions take leading batch dimensions, work on all channels at once, and leave their inputs as they are.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrcompress.finite import all_finite
from lrcompress.grams import quadratic
from lrcompress.linalg.eigen import eigh
from lrcompress.precision import exact, squares, widened

RIDGES = {torch.float32: 1e-5, torch.float64: 1e-11}
"""Added to the unit diagonal of scaled normal equations: above the rounding of their sums."""

STEEPEST = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Smallest eigenvalue, over the largest, from whose vectors a step of Newton and Schulz still makes orthonormal rows:
epsilon over it is what rounding leaves, the step squares that."""

REFIT_STEPS = 40
"""Conjugate gradient steps of a final refit: ten times those of a round of the pursuit."""


@dataclass
class SparseCode:
    """Y ≈ codes @ dictionary.

    dictionary: (..., k, p). codes: (..., n, k), zero outside support. support: (..., n, k) bool, exactly s per row
    (a coefficient on it may be zero). objectives: squared error after the start and after every round, per batch.
    """

    dictionary: Tensor
    codes: Tensor
    support: Tensor
    objectives: list[Tensor] = field(default_factory=list)

    def error(self, target: Tensor) -> Tensor:
        """(...) squared error ‖Y - C D‖², `exact`."""
        return squares(target - self.codes @ self.dictionary)


def stalled(objectives: list[Tensor], tolerance: float) -> bool:
    """Whether the last round lowered no objective by more than `tolerance` of it; 0 runs every round."""
    if tolerance == 0 or len(objectives) < 2:
        return False
    return bool((objectives[-2] - objectives[-1] <= tolerance * objectives[-1]).all())


def check_finite(target: Tensor) -> None:
    """ArithmeticError where the target has a non-finite entry."""
    if not all_finite(target):
        raise ArithmeticError("the whitened weight has non-finite entries")


def largest(scores: Tensor, count: int) -> Tensor:
    """(..., n, k) bool: the `count` largest magnitudes of every row of scores (..., n, k)."""
    chosen = scores.abs().topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def leading_directions(target: Tensor, count: int) -> Tensor:
    """(..., count, p) leading right singular vectors of Y (..., n, p) as rows, count <= p, orthonormal."""
    rows = widened(target)
    _, vectors = eigh(rows.mT @ rows)
    return vectors.flip(-1)[..., :count].mT.to(target.dtype)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows to (..., k, p), k <= p: U Vᵀ of its SVD, computed in the wide dtype.

    From the k x k eigenproblem and one Newton-Schulz step where that is exact enough, else from the SVD.
    """
    given = widened(matrix)
    values, vectors = eigh(given @ given.mT)
    if bool((values[..., 0] <= STEEPEST[given.dtype] * values[..., -1]).any()):
        u, _, vt = torch.linalg.svd(exact(given), full_matrices=False)
        return (u @ vt).to(matrix)
    rows = (vectors / values.sqrt()[..., None, :]) @ (vectors.mT @ given)
    rows = 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows
    return rows.to(matrix.dtype)


def normalised(dictionary: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms (..., k, p) of norm 1 and codes (..., n, k) with the same product; a zero atom stays as it is."""
    norms = dictionary.norm(dim=-1)
    norms = torch.where(norms > torch.finfo(norms.dtype).tiny, norms, 1.0)
    return dictionary / norms[..., None], codes * norms[..., None, :]


def least_squares_dictionary(target: Tensor, codes: Tensor, previous: Tensor | None = None) -> Tensor:
    """D (..., k, p) that minimises ‖Y - C D‖² for C (..., n, k): a combination of the rows of Y.

    As such it is optimal in every metric Y -> Y R at once, so whitened codes give the dictionary of the plain weight
    without an inverse of the Gram. The normal equations are scaled to a unit diagonal and solved in the dtype of the
    codes; their ridge draws to the `previous` dictionary (zero where there is none), which unused atoms keep.
    """
    gram = quadratic(codes.mT) if codes.dim() == 2 else codes.mT @ codes
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    scale = torch.where(dead, 1.0, diagonal.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt())
    scaled = scale[..., :, None] * gram * scale[..., None, :] + torch.diag_embed(dead.to(gram.dtype))
    right = codes.mT @ target
    right = scale[..., None] * (right if previous is None else right - gram @ previous)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for stronger in (1.0, 1e2, 1e4):
        factor, failed = torch.linalg.cholesky_ex(scaled + stronger * RIDGES[codes.dtype] * eye)
        if not bool(failed.any()):
            break
    else:
        raise ArithmeticError("the normal equations of the codes are singular")
    found = scale[..., None] * torch.cholesky_solve(right, factor)
    return found if previous is None else previous + found


def fitted_dictionary(target: Tensor, codes: Tensor) -> Tensor:
    """`least_squares_dictionary` of wide Y and C; in float32 a second step takes back what the ridge does."""
    found = least_squares_dictionary(target, codes)
    return found if codes.dtype == torch.float64 else least_squares_dictionary(target, codes, found)


def least_squares_codes(gram: Tensor, products: Tensor, support: Tensor, start: Tensor, steps: int) -> Tensor:
    """C (..., n, k) on `support` that minimises ‖Y - C D‖²; see `refit`."""
    return refit(gram, products, support, start, steps)[0]


def refit(gram: Tensor, products: Tensor, support: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """C (..., n, k) on `support` for ‖Y - C D‖², and (..., n, 1) how much of every row's energy C explains.

    All rows at once by masked conjugate gradients. gram: D Dᵀ (..., k, k); products: Y Dᵀ (..., n, k); start:
    (..., n, k), used on the support. Every step lowers the error of every row that is not yet optimal.
    """
    mask = support.to(products.dtype)
    codes = start * mask
    residual = (products - codes @ gram).mul_(mask)
    direction = residual.clone()
    size = residual.square().sum(-1, keepdim=True)
    for _ in range(steps):
        image = (direction @ gram).mul_(mask)
        curvature = (direction * image).sum(-1, keepdim=True)
        # Rows at their optimum have no direction left: 0 / 0.
        length = torch.where(curvature > 0, size / curvature, 0.0)
        codes = codes.addcmul_(direction, length)
        residual = residual.addcmul_(image, length, value=-1)
        fresh = residual.square().sum(-1, keepdim=True)
        direction = direction.mul_(torch.where(size > 0, fresh / size, 0.0)).add_(residual)
        size = fresh
    return codes, (codes * (products + residual)).sum(-1, keepdim=True)


def refitted_codes(gram: Tensor, products: Tensor, codes: Tensor, support: Tensor) -> Tensor:
    """`least_squares_codes` to convergence, wide, from codes that were the best of a dictionary near by."""
    norms = gram.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    scaled, right = gram / norms / norms[:, None], products / norms
    return least_squares_codes(scaled, right, support, codes * norms, REFIT_STEPS) / norms
