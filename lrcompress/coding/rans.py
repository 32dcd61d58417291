"""Parts of a stream, whole rows of codes each: in C where there is a compiler, in numpy where not."""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lrcompress.coding import plain
from lrcompress.coding.classes import Classes
from lrcompress.coding.plain import Part, damaged
from lrcompress.kernels.native import library

Block = npt.NDArray[np.generic]
Item = TypeVar("Item")
Result = TypeVar("Result")

_FAULTS = {
    1: plain.OUT_OF_WORDS,
    2: plain.WRONG_STATE,
    3: plain.WRONG_EXTRA,
    4: plain.OUT_OF_RANGE,
}
_MEMORY = 5


def encode(
    codes: npt.NDArray[np.int32], classes: Classes, parts: Sequence[slice], lanes: int, threads: int
) -> list[Part]:
    """A part for each slice of the rows of codes (m, n), which lie in one piece."""
    native = _native()
    if native is None:
        return plain.encode([codes[rows] for rows in parts], [classes.rows(rows) for rows in parts], lanes)
    return _each(lambda rows: _encode(native, codes[rows], classes.rows(rows), lanes), parts, threads)


def decode(parts: Sequence[Part], classes: Sequence[Classes], lanes: int, out: Sequence[Block], threads: int) -> None:
    """Fill `out`, for every part a block (rows, n) of int8, int16 or int32 in one piece; InputError where damaged."""
    native = _native()
    if native is None:
        return plain.decode(parts, classes, lanes, out)
    _ = classes[0].tables.decoding  # made once, before the threads
    whole = list(zip(parts, classes, out, strict=True))
    _each(lambda one: _decode(native, one[0], one[1], lanes, one[2]), whole, threads)
    return None


def _each(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    if min(threads, len(items)) <= 1:  # starting one thread, and waiting for it, takes longer than a small part
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(work, items))


@cache
def _typed(native: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name in ("decode_int8", "decode_int16", "decode_int32"):
        function = getattr(native, name)
        function.argtypes = [pointer, long, long, integer, long, long, *[pointer] * 8]
        function.restype = ctypes.c_int
    native.encode_extra.argtypes = [pointer, long, long, *[pointer] * 7]
    native.encode_extra.restype = long
    native.encode_words.argtypes = [pointer, long, long, *[pointer] * 8, integer, pointer, pointer]
    native.encode_words.restype = long
    return native


def _native() -> ctypes.CDLL | None:
    found = library("rans")
    return None if found is None else _typed(found)


def _encode(native: ctypes.CDLL, codes: npt.NDArray[np.int32], classes: Classes, lanes: int) -> Part:
    tables = classes.tables
    common = (
        codes.ctypes.data,
        *codes.shape,
        *(a.ctypes.data for a in (classes.row, classes.column, classes.of, tables.shift, tables.low, tables.high)),
    )
    extra = np.zeros(-(-native.encode_extra(*common, None) // 8), dtype=np.uint8)
    native.encode_extra(*common, extra.ctypes.data)
    words, states = np.empty(codes.size, dtype=np.uint16), np.empty(lanes, dtype=np.uint32)
    count = native.encode_words(
        *common, tables.frequency.ctypes.data, tables.start.ctypes.data, lanes, states.ctypes.data, words.ctypes.data
    )
    row = words[codes.size - count :].astype("<u2").view(np.uint8)
    return Part(np.concatenate([states.astype("<u4").view(np.uint8), row, extra]), count, len(extra))


def _decode(native: ctypes.CDLL, part: Part, classes: Classes, lanes: int, out: Block) -> None:
    tables = classes.tables
    arrays = (classes.row, classes.column, classes.of, tables.decoding, tables.shift, tables.low, tables.high, out)
    fault = getattr(native, f"decode_{out.dtype.name}")(
        part.data.ctypes.data, part.words, part.extra, lanes, *out.shape, *(a.ctypes.data for a in arrays)
    )
    if fault == _MEMORY:
        raise MemoryError("no memory left to decode codes")
    if fault:
        raise damaged(_FAULTS[fault])
