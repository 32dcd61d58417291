"""Rounding with feedback to both sides: what an entry's rounding gets wrong is made up for by all that follow."""

import math

import torch
from torch import Tensor

from lrcompress.linalg.damped import damped_factor

PRICE = 0.07
"""Squared steps that a bit is worth. At the entropy coder's rate 2 ln 2 / 12 = 0.116 is the slope of error against
bits of a uniform source; 0.07 was best on weights of SmolLM2 at 0.6 to 2.6 bits (docs/quality.md)."""

LARGEST_SHIFT = 0.15
"""Of the point between two codes where it is decided, towards the larger one, in steps."""


def unit_factor(gram: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """M (n, n), unit upper triangular, and d (n,): M diag(d) Mᵀ = gram + damping * its mean * I, in `order` (n,).

    Both float32 where that changes the sum by little beside the damping, wide otherwise: see `damped_factor`.
    """
    damping = max(damping, torch.finfo(torch.float32).eps)
    upper = damped_factor(gram, damping, "the layer", order, single=True)
    diagonal = upper.diagonal().clone()
    return upper.div_(diagonal), diagonal.square()


def in_steps(factor: Tensor, scale: Tensor) -> Tensor:
    """(n, n) float32: a unit factor (n, n) of entries that are counted in steps of scale (n,)."""
    scale = scale.to(factor.dtype)
    return (factor * scale[:, None]).div_(scale).float()


def expected_sizes(target: Tensor) -> Tensor:
    """(m, n) size of an entry as its row's and its column's mean size have it, of target (m, n)."""
    rows, columns = _mean_sizes(target)
    return rows[:, None] * columns


def expected_at(target: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(count,) `expected_sizes` of the entries at row (count,) and column (count,)."""
    rows, columns = _mean_sizes(target)
    return rows[row] * columns[column]


def _mean_sizes(target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean sizes of rows (m,), and of columns (n,) over the mean of all."""
    size = target.abs()
    return size.mean(1), size.mean(0) / size.mean().clamp_min(torch.finfo(size.dtype).tiny)


def offsets(expected: Tensor) -> Tensor:
    """What is added to |t| before its fraction is cut off: 1/2 less a share of the bits that a larger code costs.

    Where |t| is about exponential with mean b, expected in steps, a step more costs 1 / (b ln 2) bits. The least
    error + PRICE * bits moves the point of decision by half the price of that (rate-distortion optimised quantisation,
    Sullivan 1996, doi 10.1109/18.532878).
    """
    shift = PRICE / (2 * math.log(2)) / expected.clamp_min(torch.finfo(expected.dtype).tiny)
    return 0.5 - shift.clamp_max(LARGEST_SHIFT)


def round_two_sided(
    target: Tensor, left: Tensor, right: Tensor, offset: Tensor, tiles: type["Tiles"] | None = None
) -> Tensor:
    """Codes K (m, n), whole numbers in target's dtype, for which Nᵀ (K - target) M is small entry after entry.

    target W (m, n) in steps; left N (m, m) and right M (n, n) unit upper triangular; offset (m, n) as of `offsets`.
    With all entries of rows <= i and columns <= j but (i, j) itself rounded, T = Nᵀ (K - W) M at (i, j) is k - t for a
    known t, and k is t rounded. Where C_x = M D_x Mᵀ and C_g = N D_g Nᵀ the loss tr(C_g E C_x Eᵀ) of E = K - W is
    Σ D_g,i D_x,j T_ij²: GPTQ's feedback (arXiv 2210.17323), on the outputs' side, too.
    Tiles along an antidiagonal are independent; everything between tiles is a matrix product. `tiles` rounds those of
    an antidiagonal, by default in torch.
    """
    tiles = tiles or Tiles
    tile = tiles.size
    (m, n), dtype, device = target.shape, target.dtype, target.device
    rows, columns = -(-m // tile), -(-n // tile)
    wanted, cut = _padded(target, tile), _padded(offset, tile)
    left, right = _padded(left, tile), _padded(right, tile)
    codes = torch.zeros(rows * tile, columns * tile, dtype=dtype, device=device)
    error, carried = torch.zeros_like(codes), torch.zeros_like(codes)  # E and E M
    for diagonal in range(rows + columns - 1):
        places = [(i, diagonal - i) for i in range(max(0, diagonal - columns + 1), min(rows, diagonal + 1))]
        part = tiles(len(places), dtype, device)
        spans = [(slice(i * tile, (i + 1) * tile), slice(j * tile, (j + 1) * tile)) for i, j in places]
        for at, (a, b) in enumerate(spans):
            part.wanted[at], part.cut[at] = wanted[a, b], cut[a, b]
            torch.mm(error[a, : b.start], right[: b.start, b], out=part.by_row[at])
            torch.mm(carried[: a.start, b].T, left[: a.start, a], out=part.by_column[at])
            part.left[at], part.right[at] = left[a, a].flip(0), right[b, b].flip(0)
        part.round()
        for at, (a, b) in enumerate(spans):
            codes[a, b], error[a, b], carried[a, b] = part.codes[at], part.error[at], part.carried[at]
    return codes[:m, :n]


class Tiles:
    """`count` tiles of an antidiagonal, rounded side by side.

    wanted, cut, codes, error E, carried E M: (count, row, column). by_row: what E M has of the columns before an entry;
    by_column: what Nᵀ E M has of the rows before it, (count, column, row). left, right: the factors' own tiles, the
    last row first, so that the rows that an antidiagonal needs follow one another.
    """

    size = 64
    """Rows and columns of a tile."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count, self.tile = count, self.size
        parts = torch.zeros(9, count, self.tile, self.tile, dtype=dtype, device=device)
        self.wanted, self.cut, self.codes, self.error, self.carried = parts[:5]
        self.by_row, self.by_column, self.left, self.right = parts[5:]

    def round(self) -> None:
        """Fill codes, error and carried, antidiagonal after antidiagonal: entries along one are independent."""
        tile = self.tile
        for step in range(2 * tile - 1):
            first, last = max(0, step - tile + 1), min(tile - 1, step)  # of the rows, and of the columns
            length = last - first + 1
            wanted = self._along(self.wanted, first, last)
            before = self._along(self.by_row, first, last)
            above = self._along(self.by_column, first, last).flip(1)
            target = wanted - before - above
            code = target.abs().add_(self._along(self.cut, first, last)).floor_().copysign_(target)
            error = code - wanted
            carried = before + error
            self._along(self.codes, first, last).copy_(code)
            self._along(self.error, first, last).copy_(error)
            self._along(self.carried, first, last).copy_(carried)
            start = tile - 1 - last
            rows = slice(first, last + 1)
            self.by_row[:, rows].addcmul_(error[:, :, None], self.right[:, start : start + length])
            self.by_column[:, rows].addcmul_(carried.flip(1)[:, :, None], self.left[:, start : start + length])

    def _along(self, part: Tensor, first: int, last: int) -> Tensor:
        """(count, length) view of the entries (i, step - i) for i = first, ..., last, where step = first + last."""
        stride = (self.tile * self.tile, self.tile - 1)
        offset = part.storage_offset() + first * self.tile + last
        return part.as_strided((self.count, last - first + 1), stride, offset)


def _padded(matrix: Tensor, tile: int) -> Tensor:
    """With rows and columns of zeros up to multiples of `tile`."""
    m, n = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -n % tile, 0, -m % tile))
