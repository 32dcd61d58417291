"""Sparse dictionaries whose outputs are weighed by a full Gram: every row's codes depend on the others' errors.

Minimises tr(B (Y - C D)(Y - C D)ᵀ) for B (n, n), the second moment of the output gradients (KFAC's other factor); the
solvers of sparse_coding.py know a diagonal B only. See dictionary.py for the convention.
"""

import torch
from torch import Tensor

from lrcompress.linalg.dictionary import SparseCode, largest, least_squares_dictionary, normalised
from lrcompress.linalg.whitening import upper_root
from lrcompress.precision import squares

REFIT_STEPS = 5
STEP_GROWTH, STEP_LIMIT = 1.3, 2.0


def coupled_htp(target: Tensor, output_gram: Tensor, start: SparseCode, nonzeros: int, rounds: int) -> SparseCode:
    """`start` refined: the dictionary by least squares, then hard thresholding pursuit of all rows at once.

    target Y (n, p) and output_gram B (n, n), positive definite up to rounding, float32. Objectives are those in the
    metric B, that of the start after its dictionary's fit first; a round that would raise it only refits the codes on
    their support.
    """
    root = upper_root(output_gram).to(target.dtype)
    diagonal = output_gram.diagonal()[:, None]
    scale = torch.where(diagonal > 0, diagonal, 1.0)  # a row that no error is counted of has no step either

    def fitted(codes: Tensor, support: Tensor, previous: Tensor) -> SparseCode:
        dictionary = least_squares_dictionary(root @ target, root @ codes, previous)
        return SparseCode(*normalised(dictionary, codes), support)

    def objective(code: SparseCode) -> Tensor:
        return squares(root @ (target - code.codes @ code.dictionary))

    best = fitted(start.codes, start.support, start.dictionary)
    objectives, length = [objective(best)], 1.0
    for _ in range(rounds):
        residual = output_gram @ (target - best.codes @ best.dictionary)
        proposal = largest(best.codes + length * (residual @ best.dictionary.mT) / scale, nonzeros)
        tried = fitted(_refitted(target, output_gram, best, proposal), proposal, best.dictionary)
        value = objective(tried)
        if value < objectives[-1]:
            length = min(length * STEP_GROWTH, STEP_LIMIT)
        else:
            length /= 2
            tried = fitted(_refitted(target, output_gram, best, best.support), best.support, best.dictionary)
            value = objective(tried)
        if value < objectives[-1]:
            best = tried
        objectives.append(torch.minimum(value, objectives[-1]))
    return SparseCode(best.dictionary, best.codes, best.support, objectives)


def _refitted(target: Tensor, output_gram: Tensor, code: SparseCode, support: Tensor) -> Tensor:
    """Codes (n, k) on `support` after a few conjugate gradient steps, preconditioned by both Grams' diagonals."""
    gram, mask = code.dictionary @ code.dictionary.mT, support.to(target.dtype)
    curvatures = output_gram.diagonal()[:, None] * gram.diagonal()
    inverse = torch.where(curvatures > 0, mask / curvatures, 0.0)
    codes = code.codes * mask
    residual = (output_gram @ (target - codes @ code.dictionary)) @ code.dictionary.mT * mask
    direction = residual * inverse
    size = (residual * direction).sum()
    for _ in range(REFIT_STEPS):
        image = (output_gram @ (direction @ gram)) * mask
        curvature = (direction * image).sum()
        if not bool(curvature > 0):
            break  # at the optimum
        codes = codes + size / curvature * direction
        residual = residual - size / curvature * image
        step = residual * inverse
        fresh = (residual * step).sum()
        direction, size = step + fresh / size * direction, fresh
    return codes
