"""Column by column: what one column's rounding gets wrong is made up for by the columns that follow (OBS, GPTQ)."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrcompress.finite import all_finite
from lrcompress.linalg.whitening import check_gram, damped

DAMPING = 0.01
"""Relative to the mean of the diagonal, as GPTQ and SparseGPT use."""

Choose = Callable[[Tensor, int], Tensor]
"""(weight (m, n) updated so far, column) to the column (m,) as it will be stored.

It may look ahead as far as its block reaches, not further.
"""


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """U (n, n), upper triangular, with Uᵀ U = (G + damping * mean diagonal * I)⁻¹, float64.

    An all-zero gram counts as the identity; damping grows tenfold while rounding leaves the sum indefinite.
    """
    check_gram(gram, "the inputs")
    if not bool((gram.diagonal() > 0).any()):
        gram = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    while damping <= 1:
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damping))
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and all_finite(upper):
            return upper
        damping *= 10
    raise ArithmeticError("the Gram of the inputs is not positive semidefinite")


def sweep(weight: Tensor, factor: Tensor, block: int, choose: Choose) -> Tensor:
    """The chosen columns (m, n) of weight (m, n), float64, errors carried to the columns on their right.

    factor is U of `inverse_factor`. Within `block` columns updates are made one by one, beyond it at once
    (GPTQ, arXiv 2210.17323): the result does not depend on `block` where `choose` does not look further.
    """
    weight = weight.double().clone()
    chosen = torch.empty_like(weight)
    n = weight.shape[1]
    for start in range(0, n, block):
        end = min(start + block, n)
        errors = weight.new_empty(len(weight), end - start)
        for column in range(start, end):
            chosen[:, column] = choose(weight[:, :end], column)
            error = (weight[:, column] - chosen[:, column]) / factor[column, column]
            weight[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    if not all_finite(chosen):
        raise ArithmeticError("compensating the columns overflowed: the Gram of the inputs is too badly conditioned")
    return chosen
