"""Adding up Grams, which statistics are made of: the upper triangles of sums."""

import itertools

from torch import Tensor

PANELS, NARROWEST = 16, 128
"""A Gram is added up in so many panels of columns at most, none narrower."""


def add_gram(upper: Tensor, rows: Tensor) -> None:
    """Add Xᵀ X of rows X (t, n) to the upper triangle of `upper` (n, n), any dtype.

    Panel by panel from the diagonal on, which saves nearly half of the products; what is below it is left undefined.
    """
    n = rows.shape[1]
    panels = max(1, min(PANELS, n // NARROWEST))
    edges = [n * i // panels for i in range(panels + 1)]
    for begin, end in itertools.pairwise(edges):
        upper[begin:end, begin:].add_(rows[:, begin:end].T @ rows[:, begin:])


def symmetric(upper: Tensor) -> Tensor:
    """`upper` (n, n) itself, with what its upper triangle has below the diagonal, too."""
    for start in range(0, len(upper), NARROWEST):
        stop = min(start + NARROWEST, len(upper))
        corner = upper[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper
