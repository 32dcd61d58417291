"""Adding up Grams, which statistics are made of: the upper triangles of sums."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lrcompress.precision import exact, squares, wide

PANELS, NARROWEST = 16, 128
"""A Gram is added up in so many panels of columns at most, none narrower."""


def add_gram(upper: Tensor, rows: Tensor, rest: Tensor | None = None) -> None:
    """Add Xᵀ X of rows X (t, n) to the upper triangle of `upper` (n, n), any dtype; see `add` for `rest`.

    Panel by panel from the diagonal on, which saves nearly half of the products; what is below it is left undefined.
    """
    for begin, end in _panels(rows.shape[1]):
        own = None if rest is None else rest[begin:end, begin:]
        add(upper[begin:end, begin:], rows[:, begin:end].T @ rows[:, begin:], own)


def add(total: Tensor, part: Tensor, rest: Tensor | None = None) -> None:
    """Add `part` to `total`; what that rounds off to `rest`, where it is given: total + rest has twice the digits.

    Knuth's sum of two numbers and its error (The Art of Computer Programming 2, 4.2.2), which holds for any sizes.
    """
    if rest is None:
        total.add_(part)
        return
    found = total + part
    added = found - total
    rest.add_((total - (found - added)) + (part - added))
    total.copy_(found)


def no_rest(total: Tensor) -> Tensor | None:
    """Zeros for what is rounded off a sum that begins at `total`; None where that is float64."""
    return None if total.dtype == torch.float64 else torch.zeros_like(total)


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
    """tr(A G Aᵀ), `exact`, of A (m, n) and a symmetric G (n, n), the identity if None; products are in A's dtype."""
    if gram is None:
        return squares(matrix)
    dtype = wide(matrix.device)
    found = torch.zeros((), dtype=dtype, device=matrix.device)
    for begin, end in _panels(len(gram)):
        own, panel = matrix[:, begin:end], gram[begin:, begin:end].to(matrix.dtype)
        found += ((matrix[:, begin:end] @ panel[: end - begin]) * own).sum(dtype=dtype)
        found += 2 * ((matrix[:, end:] @ panel[end - begin :]) * own).sum(dtype=dtype)
    return exact(found)


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
