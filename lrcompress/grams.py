"""Adding up Grams, which statistics are made of: the upper triangles of sums."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

PANELS, NARROWEST = 16, 128
"""A Gram is added up in so many panels of columns at most, none narrower."""


def add_gram(upper: Tensor, rows: Tensor) -> None:
    """Add Xᵀ X of rows X (t, n) to the upper triangle of `upper` (n, n), any dtype.

    Panel by panel from the diagonal on, which saves nearly half of the products; what is below it is left undefined.
    """
    for begin, end in _panels(rows.shape[1]):
        upper[begin:end, begin:].add_(rows[:, begin:end].T @ rows[:, begin:])


def quadratic(matrix: Tensor, gram: Tensor | None = None) -> Tensor:
    """A G Aᵀ (m, m) of A (m, n) and a symmetric G (n, n), the identity if None, symmetric to the last bit.

    Its upper triangle is made panel by panel, as in `add_gram`.
    """
    image = matrix if gram is None else matrix @ gram
    upper = torch.empty(len(matrix), len(matrix), dtype=image.dtype, device=image.device)
    for begin, end in _panels(len(matrix)):
        torch.mm(image[begin:end], matrix[begin:].T, out=upper[begin:end, begin:])
    return symmetric(upper)


def energy(matrix: Tensor, gram: Tensor | None = None) -> Tensor:
    """tr(A G Aᵀ), float64, of A (m, n) and a symmetric G (n, n), the identity if None; products are in A's dtype."""
    if gram is None:
        return matrix.double().square().sum()
    found = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for begin, end in _panels(len(gram)):
        own, panel = matrix[:, begin:end], gram[begin:, begin:end].to(matrix.dtype)
        found += ((matrix[:, begin:end] @ panel[: end - begin]) * own).sum(dtype=torch.float64)
        found += 2 * ((matrix[:, end:] @ panel[end - begin :]) * own).sum(dtype=torch.float64)
    return found


def _panels(n: int) -> Iterator[tuple[int, int]]:
    """First and last but one column of every panel."""
    panels = max(1, min(PANELS, n // NARROWEST))
    return itertools.pairwise([n * i // panels for i in range(panels + 1)])


def symmetric(upper: Tensor) -> Tensor:
    """`upper` (n, n) itself, what is below the diagonal made the mirror of what is above."""
    for begin, end in _panels(len(upper)):
        own = upper[begin:end, begin:end]
        own.copy_(own.triu() + own.triu(1).T)
        upper[end:, begin:end] = upper[begin:end, end:].T
    return upper
