"""Weights that are stored row by row: what their rows are, in torch and for rows.c."""

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcompress.linalg.packing import unpack, unpack_bits

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""Numbers that the compiled code reads and writes, by their number there."""

INT8 = 2
"""Codes, by their number there."""

LANES = 16
"""Columns that the compiled code decodes at once."""

KEPT, WIDTH, PLACE_BITS = 2, 4, 2
"""Of so many neighbouring columns so many have a number, whose place has so many bits (2:4)."""

_FLIPPED = (ctypes.c_uint8 * 1)(128)
"""The zero point of int8 once its sign bit is flipped."""


class Rows(ABC):
    """A weight (rows, columns), the numbers of which depend on `tensors`."""

    columns: int

    @property
    def parts(self) -> tuple[Any, ...]:
        """What it is made of, in order, as operators are given it."""
        return tuple(vars(self).values())

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is stored."""

    @property
    def rows(self) -> int:
        return len(self.tensors[0])

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the numbers."""

    @abstractmethod
    def numbers(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, (stop - start, columns), by torch alone: what all else is tested by."""

    @abstractmethod
    def described(self) -> tuple[str, ctypes.Structure] | None:
        """What the compiled functions' names begin with, and what they read; None where they cannot."""


def _structure(name: str, longs: str, pointers: str, integers: str) -> type[ctypes.Structure]:
    parts = ((longs, ctypes.c_int64), (pointers, ctypes.c_void_p), (integers, ctypes.c_int32))
    fields = [(field, kind) for names, kind in parts for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Quantized = _structure(
    "Quantized", "rows columns group groups row_bytes zero_bytes", "codes zeros scale", "scale_kind flip"
)
_Masked = _structure("Masked", "rows columns nonzeros mask_bytes", "mask values scale", "scale_kind value_kind")
_Indexed = _structure("Indexed", "rows columns nonzeros", "index values scale", "scale_kind value_kind index_bytes")
_Pairs = _structure("Pairs", "rows columns quads row_bytes", "places values", "value_kind")
_Numbers = _structure("Numbers", "rows columns", "values", "")


@dataclass(frozen=True)
class QuantizedRows(Rows):
    """scale (code - zero), both per group of neighbouring columns, the last of which may be shorter.

    codes (rows, bytes) and zeros (rows, bytes) packed (linalg/packing.py), scale (rows, groups); or codes int8
    (rows, columns), zeros None and scale (rows, 1).
    """

    codes: Tensor
    zeros: Tensor | None
    scale: Tensor
    bits: int
    columns: int
    group: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes, self.scale) if self.zeros is None else (self.codes, self.scale, self.zeros)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def numbers(self, start: int, stop: int) -> Tensor:
        codes, scale = self.codes[start:stop], self.scale[start:stop]
        if self.zeros is None:
            return codes.to(self.dtype) * scale
        codes = unpack(codes, self.bits, self.columns).to(self.dtype)
        zeros = unpack(self.zeros[start:stop], self.bits, self.scale.shape[1]).to(self.dtype)
        return (codes - self._spread(zeros)) * self._spread(scale)

    def _spread(self, values: Tensor) -> Tensor:
        """(rows, groups) to (rows, columns): every group's value for each of its columns."""
        return values.repeat_interleave(self.group, dim=1)[:, : self.columns]

    def described(self) -> tuple[str, ctypes.Structure] | None:
        groups = self.scale.shape[1]
        if self.dtype not in KINDS or (groups > 1 and self.group % LANES):
            return None
        zeros = ctypes.addressof(_FLIPPED) if self.zeros is None else self.zeros.data_ptr()
        zero_bytes, flip = (0, 128) if self.zeros is None else (self.zeros.shape[1], 0)
        group = self.columns + LANES if groups == 1 else self.group  # one is never at its end
        found = _Quantized(self.rows, self.columns, group, groups, self.codes.shape[1], zero_bytes,
                           self.codes.data_ptr(), zeros, self.scale.data_ptr(), KINDS[self.dtype], flip)  # fmt: skip
        return f"quantized{self.bits}", found


@dataclass(frozen=True)
class SparseRows(Rows):
    """Equally many numbers in every row: values (rows, nonzeros), int8 with scale (rows,) or numbers without.

    positions: a bit mask of (rows, columns) (linalg/packing.py: pack_bits), or (rows, nonzeros) int16 or int32
    columns, ascending.
    """

    values: Tensor
    scale: Tensor | None
    positions: Tensor
    columns: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        held = (self.values, self.positions)
        return held if self.scale is None else (*held, self.scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype if self.scale is None else self.scale.dtype

    def support(self, start: int, stop: int) -> Tensor:
        """(stop - start, columns) bool: where rows of a mask have numbers."""
        return unpack_bits(self.positions, stop - start, self.columns, start)

    def numbers(self, start: int, stop: int) -> Tensor:
        values = self.values[start:stop]
        if self.scale is not None:
            values = values.to(self.dtype) * self.scale[start:stop, None]
        found = values.new_zeros(stop - start, self.columns)
        if self.positions.dim() == 1:
            return found.masked_scatter(self.support(start, stop), values)
        return found.scatter(1, self.positions[start:stop].long(), values)

    def described(self) -> tuple[str, ctypes.Structure] | None:
        if self.dtype not in KINDS:
            return None
        scale, kind = (None, 0) if self.scale is None else (self.scale.data_ptr(), KINDS[self.dtype])
        sizes = (self.rows, self.columns, self.values.shape[1])
        pointers = (self.positions.data_ptr(), self.values.data_ptr(), scale)
        kinds = (kind, INT8 if self.scale is not None else KINDS[self.dtype])
        if self.positions.dim() == 1:
            return "masked", _Masked(*sizes, len(self.positions), *pointers, *kinds)
        return "indexed", _Indexed(*sizes, *pointers, *kinds, self.positions.itemsize)


@dataclass(frozen=True)
class PairRows(Rows):
    """Two of every four neighbouring columns: values (rows, 2 quads), positions (rows, bytes) of packed places."""

    values: Tensor
    positions: Tensor
    columns: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.positions

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def places(self, start: int, stop: int) -> Tensor:
        """(stop - start, quads, 2): the columns within their quad."""
        kept = self.values.shape[1]
        return unpack(self.positions[start:stop], PLACE_BITS, kept).long().reshape(stop - start, -1, KEPT)

    def numbers(self, start: int, stop: int) -> Tensor:
        values, places = self.values[start:stop], self.places(start, stop)
        quads = values.new_zeros(stop - start, places.shape[1], WIDTH)
        return quads.scatter(-1, places, values.reshape(places.shape)).flatten(1)[:, : self.columns]

    def described(self) -> tuple[str, ctypes.Structure] | None:
        if self.dtype not in KINDS:
            return None
        quads = self.values.shape[1] // KEPT
        pointers = (self.positions.data_ptr(), self.values.data_ptr())
        sizes = (self.rows, self.columns, quads, self.positions.shape[1])
        return "pairs", _Pairs(*sizes, *pointers, KINDS[self.dtype])


@dataclass(frozen=True)
class NumberRows(Rows):
    """values (rows, columns), as they are."""

    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def numbers(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def described(self) -> tuple[str, ctypes.Structure] | None:
        if self.dtype not in KINDS:
            return None
        return f"numbers{KINDS[self.dtype]}", _Numbers(*self.values.shape, self.values.data_ptr())
