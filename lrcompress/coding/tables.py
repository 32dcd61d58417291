"""Frequency tables of a class: chosen from its histogram, written, read and checked."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lrcompress.coding.bits import BitReader, BitWriter
from lrcompress.errors import InputError

Array = npt.NDArray[np.generic]

PRECISION = 12
TOTAL = 1 << PRECISION
REACH = 127
"""Tables hold values from -REACH to REACH."""
SYMBOLS = 256
"""Symbol 0 is the escape, symbol 1 + i is the value low + i."""
ESCAPE = -128
"""In place of a value that no table holds, while it is not yet looked up."""
MAX_SHIFT = 24
MAX_CLASSES = 255
FAR_BITS = 17
"""What a value beyond REACH is reckoned to take in the side list."""


@dataclass(frozen=True)
class Tables:
    """Of T classes.

    shift (T) uint8: lowest bits of a code, stored as they are; what is left is a value. low, high (T) int32:
    values from low to high are symbols, others are escaped. frequency (T, 256) uint16: of symbols, in 4096ths.
    """

    shift: npt.NDArray[np.uint8]
    low: npt.NDArray[np.int32]
    high: npt.NDArray[np.int32]
    frequency: npt.NDArray[np.uint16]

    @cached_property
    def start(self) -> npt.NDArray[np.uint16]:
        """(T, 256): sums of the frequencies before."""
        before = np.cumsum(self.frequency, axis=1, dtype=np.int64) - self.frequency
        return before.astype(np.uint16)

    @cached_property
    def decoding(self) -> npt.NDArray[np.uint32]:
        """(T, 4096): value in 8 bits | frequency - 1 in 12 | slot - start in 12."""
        found = np.empty((len(self.shift), TOTAL), dtype=np.uint32)
        slots = np.arange(TOTAL, dtype=np.int64)
        for index, (low, row, start) in enumerate(zip(self.low, self.frequency, self.start, strict=True)):
            symbol = np.repeat(np.arange(SYMBOLS), row)
            value = np.where(symbol == 0, ESCAPE, symbol - 1 + int(low)) & 255
            found[index] = value | (row[symbol].astype(np.int64) - 1) << 8 | (slots - start[symbol]) << 20
        return found


def fitted(histograms: npt.NDArray[np.int64], shift: npt.NDArray[np.uint8]) -> tuple[Tables, float]:
    """Tables (T) for histograms (T, 256) of the values -127 to 127, index 0 for those beyond, and the bits they give.

    The bits are those of the values, their escapes and the tables; low bits that are stored as they are come on top.
    """
    rows = [_best(histogram) for histogram in histograms]
    low = np.array([row[0] for row in rows], dtype=np.int32)
    count = np.array([row[1] for row in rows], dtype=np.int32)
    tables = Tables(shift, low, low + count - 1, np.array([row[2] for row in rows], dtype=np.uint16))
    return tables, sum(row[3] for row in rows)


def _best(histogram: npt.NDArray[np.int64]) -> tuple[int, int, npt.NDArray[np.int64], float]:
    """Of ranges whose outermost values occur often enough, the one of fewest bits: low, count, frequencies, bits."""
    total = int(histogram.sum())
    found: tuple[int, int, npt.NDArray[np.int64], float] | None = None
    tried: set[tuple[int, int]] = set()
    for least in sorted({1, 2, 3, 5, 8, total >> 14, total >> 13, total >> 12, total >> 11} - {0}):
        inside = np.flatnonzero(histogram[1:] >= least) + 1
        first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (128, 128)
        if (first, last) in tried:
            continue
        tried.add((first, last))
        symbols = np.zeros(SYMBOLS, dtype=np.int64)
        symbols[1 : 1 + last - first] = histogram[first:last]
        symbols[0] = total - symbols.sum()
        frequency = normalised(symbols)
        bits = _bits(histogram, symbols, frequency, first, last)
        if found is None or bits < found[3]:
            found = (first - 128, last - first, frequency, bits)
    assert found is not None
    return found


def normalised(symbols: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Frequencies that add up to 4096 for counts (256), at least 1 for what occurs; nothing counted is all escapes.

    In integers and correctly rounded quotients alone, so that every machine finds the same.
    """
    total = int(symbols.sum())
    if total == 0:
        return np.where(np.arange(SYMBOLS) == 0, TOTAL, 0).astype(np.int64)
    frequency = (symbols * (2 * TOTAL) + total) // (2 * total)
    frequency[(symbols > 0) & (frequency == 0)] = 1
    while (missing := TOTAL - int(frequency.sum())) != 0:
        if missing > 0:
            frequency[int(np.argmax(symbols / (frequency + 0.5)))] += 1
        else:
            loss = np.where(frequency > 1, symbols / np.maximum(frequency - 0.5, 0.5), np.inf)
            frequency[int(np.argmin(loss))] -= 1
    return frequency


def _bits(
    histogram: npt.NDArray[np.int64],
    symbols: npt.NDArray[np.int64],
    frequency: npt.NDArray[np.int64],
    first: int,
    last: int,
) -> float:
    writer = BitWriter()
    _write_one(writer, 0, first - 128, last - first, frequency)
    used = symbols > 0
    bits = float(np.rint(symbols[used] * (PRECISION - np.log2(frequency[used]))).sum())
    values = np.arange(SYMBOLS)
    past = np.where(values < first, 2 * (first - values), 2 * (values - last) + 1)
    gammas = 2 * np.floor(np.log2(np.maximum(past, 1))) + 1
    gammas[0] = FAR_BITS
    outside = (values < first) | (values >= last)
    return bits + float((histogram * gammas)[outside].sum()) + len(writer.text())


def write(writer: BitWriter, tables: Tables) -> None:
    """Append them."""
    for shift, low, high, row in zip(tables.shift, tables.low, tables.high, tables.frequency, strict=True):
        _write_one(writer, int(shift), int(low), int(high - low) + 1, row)


def _write_one(writer: BitWriter, shift: int, low: int, count: int, frequency: Array) -> None:
    """Frequencies by how many bits they have, as a difference to the one before, then all bits but the first."""
    writer.gamma(shift + 1)
    writer.signed(low)
    writer.gamma(count + 1)
    before = 0
    for value in frequency[: count + 1].tolist():
        width = value.bit_length()
        writer.signed(width - before)
        writer.binary(value - (1 << width >> 1), max(width - 1, 0))
        before = width


def read(reader: BitReader, count: int) -> Tables:
    """`count` tables; InputError where they are impossible."""
    shift, low, high = np.zeros(count, np.uint8), np.zeros(count, np.int32), np.zeros(count, np.int32)
    frequency = np.zeros((count, SYMBOLS), dtype=np.uint16)
    for index in range(count):
        bits, first, length = reader.gamma() - 1, reader.signed(), reader.gamma() - 1
        if bits > MAX_SHIFT or first < -REACH or first + length - 1 > REACH:
            raise InputError("the coded stream is damaged: a table holds values that no table may hold")
        shift[index], low[index], high[index] = bits, first, first + length - 1
        row = _read_frequencies(reader, length + 1)
        if sum(row) != TOTAL:
            raise InputError("the coded stream is damaged: a table's frequencies do not add up")
        frequency[index, : length + 1] = row
    return Tables(shift, low, high, frequency)


def _read_frequencies(reader: BitReader, count: int) -> list[int]:
    width, row = 0, []
    for _ in range(count):
        width += reader.signed()
        if not 0 <= width <= PRECISION + 1:
            raise InputError("the coded stream is damaged: a table's frequency is out of range")
        row.append(reader.binary(width - 1) | 1 << width - 1 if width else 0)
    return row
