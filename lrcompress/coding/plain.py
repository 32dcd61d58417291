"""rANS in numpy: what kernels/rans.c does, step by step for all lanes of all parts. The way without a compiler.

A lane is a state x of 32 bits, at least 2^16 between symbols. Writing goes backwards: where x would leave its 32 bits,
its lower 16 become a word; then x = (x // f) 4096 + x mod f + start for a symbol of frequency f. Reading undoes it
forwards, lanes in turn, all from one row of words.
Source: J. Duda, arXiv 1311.2540; interleaving: F. Giesen, arXiv 1402.3392.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrcompress.coding.bits import BitReader, BitWriter
from lrcompress.coding.classes import Classes
from lrcompress.coding.tables import ESCAPE, PRECISION, TOTAL
from lrcompress.errors import InputError

LOWER = 1 << 16
OUT_OF_WORDS = "words are missing or left over"
WRONG_STATE = "a lane does not end where it began"
WRONG_EXTRA = "its escaped values or low bits are too few or too many"
OUT_OF_RANGE = "a code is out of range"


def damaged(what: str) -> InputError:
    """The error of a part whose bytes cannot be."""
    return InputError(f"the coded stream is damaged: {what}; fetch or make the file again")


@dataclass(frozen=True)
class Part:
    """data: lanes' states of 4 bytes, `words` of 2 bytes, `extra` bytes of low bits and escaped values."""

    data: npt.NDArray[np.uint8]
    words: int
    extra: int


def encode(blocks: Sequence[npt.NDArray[np.int32]], classes: Sequence[Classes], lanes: int) -> list[Part]:
    """A part for every block (rows, n) of codes."""
    kinds = [_kinds(each).ravel() for each in classes]
    tables = classes[0].tables
    width = max(-(-block.size // lanes) for block in blocks)
    frequency = np.full((width, len(blocks), lanes), TOTAL, dtype=np.uint64)
    start = np.zeros((width, len(blocks), lanes), dtype=np.uint64)
    for index, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        values = block.ravel() >> tables.shift[kind]
        inside = (values >= tables.low[kind]) & (values <= tables.high[kind])
        symbol = np.where(inside, values - tables.low[kind] + 1, 0)
        for into, of in ((frequency, tables.frequency), (start, tables.start)):
            flat = np.full(width * lanes, TOTAL if into is frequency else 0, dtype=np.uint64)
            flat[: block.size] = of[kind, symbol]
            into[:, index] = flat.reshape(width, lanes)
    state = np.full((len(blocks), lanes), LOWER, dtype=np.uint64)
    written = np.zeros((width, len(blocks), lanes), dtype=bool)
    words = np.zeros((width, len(blocks), lanes), dtype="<u2")
    for step in range(width - 1, -1, -1):
        f = frequency[step]
        written[step] = full = state >= f << np.uint64(32 - PRECISION)
        words[step] = state & np.uint64(LOWER - 1)
        state = np.where(full, state >> np.uint64(16), state)
        state = (state // f << np.uint64(PRECISION)) + state % f + start[step]
    parts = []
    for index, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        row = words[:, index][written[:, index]]
        extra = _extra(block.ravel(), kind, classes[index])
        data = state[index].astype("<u4").tobytes() + row.tobytes() + extra
        parts.append(Part(np.frombuffer(data, dtype=np.uint8), len(row), len(extra)))
    return parts


def _kinds(classes: Classes) -> npt.NDArray[np.uint8]:
    """(rows, n): the class of every entry."""
    return classes.of[classes.row[:, None].astype(np.int64) + classes.column[None]]


def _extra(codes: npt.NDArray[np.int32], kind: npt.NDArray[np.uint8], classes: Classes) -> bytes:
    tables = classes.tables
    widths = tables.shift[kind].astype(np.int64)
    ends = np.cumsum(widths)
    place = np.arange(int(ends[-1]))
    low = np.repeat(codes.astype(np.int64), widths) >> (np.repeat(ends, widths) - 1 - place) & 1
    writer = BitWriter()
    values = codes >> widths
    for at in np.flatnonzero((values < tables.low[kind]) | (values > tables.high[kind])):
        value, first, last = int(values[at]), int(tables.low[kind[at]]), int(tables.high[kind[at]])
        writer.gamma(2 * (value - last) - 1 if value > last else 2 * (first - value))
    far = np.frombuffer(writer.text().encode(), dtype=np.uint8) - ord("0")
    return np.packbits(np.concatenate([low.astype(np.uint8), far])).tobytes()


def decode(
    parts: Sequence[Part], classes: Sequence[Classes], lanes: int, out: Sequence[npt.NDArray[np.generic]]
) -> None:
    """Fill `out`, a block (rows, n) of codes of any integer type for every part; InputError where a part is damaged."""
    table = classes[0].tables.decoding
    kinds = [_kinds(each).ravel() for each in classes]
    sizes = np.array([len(kind) for kind in kinds])
    width = int(-(-sizes.max() // lanes))
    kind_at = np.zeros((len(parts), width * lanes), dtype=np.uint8)
    held = np.array([part.words for part in parts])
    words = np.zeros((len(parts), int(held.max()) + 1), dtype=np.uint32)
    state = np.empty((len(parts), lanes), dtype=np.uint32)
    for index, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
        kind_at[index, : len(kind)] = kind
        data = part.data[: 4 * lanes + 2 * part.words].tobytes()
        state[index] = np.frombuffer(data, dtype="<u4", count=lanes)
        words[index, : part.words] = np.frombuffer(data, dtype="<u2", offset=4 * lanes)
    if (state < LOWER).any():
        raise damaged(WRONG_STATE)
    values = np.empty((len(parts), width * lanes), dtype=np.int8)
    at, which, lane = np.zeros(len(parts), dtype=np.int64), np.arange(len(parts))[:, None], np.arange(lanes)
    for first in range(0, width * lanes, lanes):
        entry = table[kind_at[:, first : first + lanes], state & (TOTAL - 1)]
        values[:, first : first + lanes] = (entry & 255).astype(np.uint8).view(np.int8)
        active = first + lane < sizes[:, None]
        state = np.where(active, ((entry >> 8 & TOTAL - 1) + 1) * (state >> PRECISION) + (entry >> 20), state)
        low = state < LOWER
        order = np.cumsum(low, axis=1)
        after = at + order[:, -1]
        if (after > held).any():
            raise damaged(OUT_OF_WORDS)
        word = words[which, np.where(low, at[:, None] + order - 1, 0)]
        state = np.where(low, state << 16 | word, state)
        at = after
    if (at != held).any():
        raise damaged(OUT_OF_WORDS)
    if (state != LOWER).any():
        raise damaged(WRONG_STATE)
    for index, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
        extra = part.data[4 * lanes + 2 * part.words :]
        codes = _whole(values[index, : len(kind)].astype(np.int64), kind, classes[index], extra)
        limits = np.iinfo(out[index].dtype.name)
        if codes.min() < limits.min or codes.max() > limits.max:
            raise damaged(OUT_OF_RANGE)
        out[index][...] = codes.reshape(out[index].shape)


def _whole(
    values: npt.NDArray[np.int64], kind: npt.NDArray[np.uint8], classes: Classes, extra: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Codes of values: escapes looked up, low bits put back."""
    tables, bits = classes.tables, np.unpackbits(extra)
    widths = tables.shift[kind].astype(np.int64)
    ends = np.cumsum(widths)
    if ends[-1] > len(bits):
        raise damaged(WRONG_EXTRA)
    reader = BitReader((bits[ends[-1] :] + ord("0")).tobytes().decode())
    for at in np.flatnonzero(values == ESCAPE):
        far = reader.gamma() - 1
        past = (far >> 1) + 1
        values[at] = tables.low[kind[at]] - past if far & 1 else tables.high[kind[at]] + past
    if -(-(int(ends[-1]) + reader.at) // 8) != len(extra):
        raise damaged(WRONG_EXTRA)
    starts = ends - widths
    for place in range(int(widths.max())):
        held = widths > place
        values[held] = values[held] << 1 | bits[starts[held] + place]
    return values
