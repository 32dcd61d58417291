"""Matrices of integer codes, each tile of 16 × 32 in as many bits as it needs, and products with them.

The layout is described in tiles_layout.h; tiles.c packs, multiplies and unpacks; `codes` here is the plain way, on any
device. A weight is codes ∘ row scale ∘ column scale. `indices` (out + in) uint8 are the scales' places in `levels`
(2, 256), those of rows and of columns: float32, held as int32 so that a model's `.to(dtype)` leaves them alone.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrcompress.kernels.native import library

ROWS, COLUMNS = 16, 32
BLOCK = 1024
"""Rows that are sorted among themselves, and unpacked together where many rows of an input are multiplied."""
FEW = 8
"""Up to so many rows of an input are multiplied without unpacking: as many as MOST in tiles_multiply.h."""
MOST_COLUMNS = 1 << 16
KINDS = {torch.float32: 0, torch.bfloat16: 1}
_WIDEST, _MOST_FAR = 32, 255


Gains = tuple[Tensor | None, Tensor | None]
"""What multiplies the scales of rows (out,) and of columns (in,), in float32, where they are trained."""
NO_GAINS: Gains = (None, None)


class Tiles(NamedTuple):
    """Tensors of a matrix (out, in), see tiles_layout.h: tiles (vectors, 16) int32, head (strips, tiles, 2) uint8,
    far (count,) int16, start (strips, 2) int32; row_order (out,) and column_order (in,) are unsigned, in int16."""

    tiles: Tensor
    head: Tensor
    far: Tensor
    start: Tensor
    row_order: Tensor
    column_order: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.row_order.shape[0], self.column_order.shape[0]


class Held(ctypes.Structure):
    """As in tiles_layout.h."""

    _fields_: Sequence[tuple[str, Any]] = [  # type: ignore[misc]
        *((name, ctypes.c_int64) for name in ("rows", "columns", "block")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *Tiles._fields,
                *("row_index", "column_index", "row_scale", "column_scale", "row_gain", "column_gain"),
            )
        ),
    ]


def pack(shape: tuple[int, int], energies: tuple[Tensor, Tensor], block: Callable[[slice], Tensor]) -> Tiles | None:
    """Tiles of the codes (rows, in) that `block` gives for a slice of the rows, asked for from the first to the last.

    energies (out,) and (in,): what grows with the size of the codes in a row and in a column. None where tiles cannot
    be: without a compiler, for rows longer than MOST_COLUMNS.
    """
    native = compiled()
    if native is None or shape[1] > MOST_COLUMNS:
        return None
    columns = energies[1].argsort(stable=True).to(torch.int32).to(torch.int16)
    count = -(-shape[1] // COLUMNS)
    orders: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    used = torch.zeros(2, dtype=torch.int32, device="cpu")
    for first in range(0, shape[0], BLOCK):
        rows = slice(first, min(first + BLOCK, shape[0]))
        codes = block(rows).contiguous()
        orders.append(energies[0][rows].argsort(stable=True).to(torch.int16))
        strips, before = -(-len(codes) // ROWS), used.tolist()
        data = torch.empty(strips * count * _WIDEST, 16, dtype=torch.int32, device="cpu")
        far = torch.empty(strips * count * _MOST_FAR, dtype=torch.int16, device="cpu")
        head = torch.empty(strips, count, 2, dtype=torch.uint8, device="cpu")
        start = torch.empty(strips, 2, dtype=torch.int32, device="cpu")
        pointers = (t.data_ptr() for t in (orders[-1], columns, data, head, far, start, used))
        native.tiles_pack(codes.data_ptr(), codes.itemsize, *codes.shape, *pointers)
        vectors, beside = (after - old for after, old in zip(used.tolist(), before, strict=True))
        parts.append((data[:vectors].clone(), head, far[:beside].clone(), start))
    data, heads, beyond, starts = (torch.cat(each) for each in zip(*parts, strict=True))
    return Tiles(data, heads, beyond, starts, torch.cat(orders), columns)


def codes(held: Tiles) -> Tensor:
    """The codes (out, in), int32; in C where that can be, which is what the plain way here is compared with."""
    native = compiled() if held.tiles.device.type == "cpu" else None
    return _plain_codes(held) if native is None else _unpacked(native, held, None).to(torch.int32)


def _plain_codes(held: Tiles) -> Tensor:
    width, beside = (part.flatten().long() for part in held.head.unbind(-1))
    words = held.tiles.long() & 0xFFFFFFFF
    begin = width.cumsum(0) - width
    found = words.new_zeros(len(width), 2 * ROWS, COLUMNS // 2)
    for bits in width.unique().tolist():
        if bits:
            at = (width == bits).nonzero().flatten()
            own = words[begin[at, None] + torch.arange(bits, device=at.device)]
            for code in range(2 * ROWS):
                word, low = divmod(code * bits, 32)
                value = own[:, word] >> low
                if low + bits > 32:
                    value = value | own[:, word + 1] << (32 - low)
                value = value & ((1 << bits) - 1)
                found[at, code] = value - ((value >> (bits - 1)) << bits)
    matrix = (
        found.reshape(*held.head.shape[:2], ROWS, COLUMNS).transpose(1, 2).reshape(-1, held.head.shape[1] * COLUMNS)
    )
    tile = torch.arange(len(width), device=width.device).repeat_interleave(beside)
    strip, across = tile // held.head.shape[1], tile % held.head.shape[1]
    place = held.far.long() & 511
    matrix.index_put_(
        (strip * ROWS + place % ROWS, across * COLUMNS + place // ROWS), held.far.long() >> 9, accumulate=True
    )
    out = matrix.new_empty(held.shape, dtype=torch.int32)
    out[_rows(held)[:, None], _columns(held)] = matrix[: held.shape[0], : held.shape[1]].to(torch.int32)
    return out


def _rows(held: Tiles) -> Tensor:
    return torch.arange(held.shape[0], device=held.row_order.device) // BLOCK * BLOCK + held.row_order.long()


def _columns(held: Tiles) -> Tensor:
    return held.column_order.long() & 0xFFFF


def scales(levels: Tensor, indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Those of rows (out,) and of columns (in,), float32."""
    rows, columns = indices.long().split(list(shape))
    return levels[0].view(torch.float32)[rows], levels[1].view(torch.float32)[columns]


def described(held: Tiles, levels: Tensor, indices: Tensor, gains: Gains = NO_GAINS) -> Held:
    """What compiled code reads; the tensors are to live on."""
    pointers = [t.data_ptr() for t in held]
    (rows, columns), places, grid = held.shape, indices.data_ptr(), levels.data_ptr()
    own = [None if gain is None else gain.data_ptr() for gain in gains]
    return Held(rows, columns, BLOCK, *pointers, places, places + rows, grid, grid + 4 * levels.shape[1], *own)


def _unpacked(native: ctypes.CDLL, held: Tiles, scaled: tuple[Tensor, Tensor] | None) -> Tensor:
    """The codes (out, in), or levels and indices given the weight, in float32."""
    rows, columns = held.shape
    own = described(held, *scaled) if scaled else described(held, held.start, held.start)
    panel = torch.empty(rows, held.head.shape[1] * COLUMNS, device="cpu")
    native.tiles_unpack(own, 0, rows, panel.data_ptr(), 0, scaled is not None, torch.get_num_threads())
    out = torch.empty(rows, columns, device="cpu")
    out[:, _columns(held)] = panel[:, :columns]
    return out * scales(*scaled, held.shape)[1] if scaled else out


@cache
def _typed(native: ctypes.CDLL) -> ctypes.CDLL:
    held, pointer, long, integer = ctypes.POINTER(Held), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    native.tiles_pack.argtypes = [pointer, integer, long, long, *[pointer] * 7]
    native.tiles_multiply.argtypes = [held, pointer, long, pointer, integer]
    native.tiles_unpack.argtypes = [held, long, long, pointer, integer, integer, integer]
    native.tiles_rows.argtypes = [held, pointer, long, pointer, integer]
    native.tiles_sort.argtypes = native.tiles_unsort.argtypes = [held, pointer, long, pointer, integer, integer]
    native.tiles_paired.argtypes = [pointer, pointer, long, long, pointer, integer, integer]
    nothing = ("pack", "unpack", "rows", "unsort", "paired")
    for function in (getattr(native, f"tiles_{name}") for name in nothing):
        function.restype = None
    native.tiles_multiply.restype = native.tiles_sort.restype = integer
    return native


def compiled() -> ctypes.CDLL | None:
    """The compiled code, with its arguments' types; None where it cannot be had."""
    found = library("tiles")
    return None if found is None else _typed(found)


TENSORS = ", ".join(f"Tensor {name}" for name in (*Tiles._fields, "levels", "indices"))
torch.library.define("lrcompress::tiles_dense", f"({TENSORS}, ScalarType dtype) -> Tensor")
torch.library.define("lrcompress::tiles_rows", f"(Tensor rows, {TENSORS}, ScalarType dtype) -> Tensor")


def dense(held: Tiles, levels: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in)."""
    return torch.ops.lrcompress.tiles_dense(*held, levels, indices, dtype)  # type: ignore[no-any-return]


def rows_of(rows: Tensor, held: Tiles, levels: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (..., in) of the weight for integers (...)."""
    return torch.ops.lrcompress.tiles_rows(rows, *held, levels, indices, dtype)  # type: ignore[no-any-return]


def _dense(*arguments: Any) -> Tensor:
    *tensors, dtype = arguments
    held, levels, indices = Tiles(*tensors[:-2]), *tensors[-2:]
    native = compiled() if held.tiles.device.type == "cpu" and dtype != torch.float64 else None
    if native is not None:
        return _unpacked(native, held, (levels, indices)).to(dtype)
    rows, columns = (scale.to(dtype) for scale in scales(levels, indices, held.shape))
    return codes(held).to(dtype) * rows[:, None] * columns


def _rows_of(rows: Tensor, *arguments: Any) -> Tensor:
    *tensors, dtype = arguments
    held, levels, indices = Tiles(*tensors[:-2]), *tensors[-2:]
    native = compiled() if held.tiles.device.type == "cpu" and dtype != torch.float64 else None
    if native is None:
        return _dense(*arguments)[rows]
    if rows.numel() and not (0 <= int(rows.min()) and int(rows.max()) < held.shape[0]):
        raise IndexError(f"a row beyond the {held.shape[0]} of the table")
    wanted = rows.long().contiguous()
    out = torch.empty(*rows.shape, held.shape[1], device="cpu")
    own = described(held, levels, indices)
    native.tiles_rows(own, wanted.data_ptr(), wanted.numel(), out.data_ptr(), torch.get_num_threads())
    return out.to(dtype)


def _fake_dense(*arguments: Any) -> Tensor:
    held = Tiles(*arguments[:-3])
    return held.tiles.new_empty(held.shape, dtype=arguments[-1])


def _fake_rows(rows: Tensor, *arguments: Any) -> Tensor:
    held = Tiles(*arguments[:-3])
    return held.tiles.new_empty(*rows.shape, held.shape[1], dtype=arguments[-1])


torch.library.impl("lrcompress::tiles_dense", "CompositeExplicitAutograd", _dense)
torch.library.impl("lrcompress::tiles_rows", "CompositeExplicitAutograd", _rows_of)
torch.library.register_fake("lrcompress::tiles_dense", _fake_dense)
torch.library.register_fake("lrcompress::tiles_rows", _fake_rows)
