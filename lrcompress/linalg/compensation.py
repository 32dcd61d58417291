"""Column by column: what one column's rounding gets wrong is made up for by the columns that follow (OBS, GPTQ)."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrcompress.finite import all_finite
from lrcompress.linalg.damped import damped_factor
from lrcompress.precision import widened

DAMPING = 0.01
"""Relative to the mean of the diagonal, as GPTQ and SparseGPT use."""

Choose = Callable[[Tensor, int], Tensor]
"""(weight (m, n) updated so far, column) to the column (m,) as it will be stored.

It may look ahead as far as its block reaches, not further.
"""


def gram_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """V (n, n), upper triangular, with V Vᵀ = G + damping * mean diagonal * I, wide: see `damped_factor`.

    It is the inverse of GPTQ's factor of (G + ...)⁻¹, at a quarter of the cost.
    """
    return damped_factor(gram, damping, "the inputs")


def sweep(weight: Tensor, factor: Tensor, block: int, choose: Choose) -> Tensor:
    """The chosen columns (m, n) of weight (m, n), wide, errors carried to the columns on their right.

    factor is V of `gram_factor`. The columns F that are left get the errors E of those chosen, A, so that the output
    changes least, F + E V_AF V_FF⁻¹ (GPTQ, arXiv 2210.17323): within `block` columns one by one, beyond it at once,
    when a block is reached. The result does not depend on `block` where `choose` does not look further.
    """
    rest = widened(weight).T.clone(memory_format=torch.contiguous_format).T  # columns are what is worked on
    chosen = torch.empty_like(rest)
    n = weight.shape[1]
    for start in range(0, n, block):
        end = min(start + block, n)
        own = factor[start:end, start:end]
        inverse = torch.linalg.solve_triangular(own, torch.eye(end - start).to(own), upper=True)
        if start:  # columns that were chosen hold what they lost
            rest[:, start:end] += rest[:, :start] @ (factor[:start, start:end] @ inverse)
        for column in range(start, end):
            place = column - start
            chosen[:, column] = choose(rest[:, :end], column)
            error = (rest[:, column] - chosen[:, column]) / inverse[place, place]
            rest[:, column + 1 : end].addr_(error, inverse[place, place + 1 :], alpha=-1)
        rest[:, start:end] = weight[:, start:end] - chosen[:, start:end]
    if not all_finite(chosen):
        raise ArithmeticError("compensating the columns overflowed: the Gram of the inputs is too badly conditioned")
    return chosen
