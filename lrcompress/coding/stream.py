"""A matrix of integer codes as one stream of bytes, and back: all of it, or the parts that hold some rows.

"LRC1" | CRC-32 of the header (4 bytes, little-endian) | header's length (4 bytes) | header |
energies | parts, one behind the other. The header, as bits (coding/bits.py): length of the stream, rows, columns,
bytes a code, log2 of the lanes, rows a part; then what the energies and what the codes are read by: lanes, tables;
then for the energies and for every part its words, its extra bytes and its CRC-32. Energies, of all rows and then of
all columns, are themselves a part of one row, of two classes.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrcompress.coding import rans, tables
from lrcompress.coding.bits import BitReader, BitWriter
from lrcompress.coding.classes import Classes, sorted_codes
from lrcompress.coding.plain import Part, damaged
from lrcompress.coding.tables import SYMBOLS, fitted
from lrcompress.errors import InputError

MAGIC = b"LRC1"
FIXED = 12
PART = 1 << 18
"""Codes a part, about: enough that lanes cost little, few enough that parts keep all threads busy."""
LANES = 32
BYTES_A_LANE = 1200
"""A lane of a part costs about 3 bytes: parts below LANES times this have fewer."""
TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class _Plan:
    """What is known before coding; bits: estimated, of everything."""

    classes: Classes
    energies: Classes
    rows: int
    lanes: int
    energy_lanes: int
    bits: float


def encode(codes: Tensor, threads: int | None = None) -> Tensor:
    """Codes (m, n) of any integer type, within int32, as a stream: uint8, one axis, on the CPU.

    Equal codes give equal bytes on every machine. InputError for another shape or type, or codes out of range.
    """
    _checked(codes)
    plan = _planned(codes)
    whole = codes.to("cpu", torch.int32).contiguous().numpy()
    threads = torch.get_num_threads() if threads is None else threads
    parts = rans.encode(whole, plan.classes, _slices(len(whole), plan.rows), plan.lanes, threads)
    energies = rans.encode(_energy_row(plan.classes), plan.energies, [slice(0, 1)], plan.energy_lanes, 1)
    stream = _joined(whole.shape, _bytes_a_code(whole), plan, energies[0], parts)
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def estimated_bits(codes: Tensor) -> float:
    """Length in bits, within 0.5 %, of the stream that `encode` would make."""
    _checked(codes)
    return _planned(codes).bits


def coded_bytes(codes: Tensor) -> int:
    """Length in bytes, within 0.5 %, of the stream that `encode` would make."""
    return round(estimated_bits(codes) / 8)


def decode(stream: Tensor, shape: tuple[int, int], rows: slice | None = None, threads: int | None = None) -> Tensor:
    """The codes (m, n) of a stream, or those of `rows` (step 1) alone.

    int8 where all codes of the stream fit, else int16, else int32.
    InputError where the stream is damaged or of another shape. Only what is decoded is checked beside the header.
    """
    data = stream.contiguous().cpu().numpy()
    header = _read(data, shape)
    first, last, step = (rows or slice(None)).indices(shape[0])
    if step != 1:
        raise InputError(f"rows {rows} of a coded stream: only neighbouring rows can be read, give a slice of step 1")
    slices = _slices(shape[0], header.rows)
    wanted = [index for index, each in enumerate(slices) if each.start < last and each.stop > first]
    base = slices[wanted[0]].start if wanted else first
    out = torch.empty(slices[wanted[-1]].stop - base if wanted else 0, shape[1], dtype=header.dtype)
    if wanted:
        into = out.numpy()
        rans.decode(
            [_cut(data, header.places[index], header.lanes) for index in wanted],
            [header.classes.rows(slices[index]) for index in wanted],
            header.lanes,
            [into[slices[index].start - base : slices[index].stop - base] for index in wanted],
            torch.get_num_threads() if threads is None else threads,
        )
    return out[first - base : max(last, first) - base]


def energies(stream: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of rows (m,) and of columns (n,), uint8: they grow with the mean size of their codes. Errors as of `decode`."""
    classes = _read(stream.contiguous().cpu().numpy(), shape).classes
    return torch.from_numpy(classes.row), torch.from_numpy(classes.column)


def _checked(codes: Tensor) -> None:
    if (
        codes.ndim != 2
        or codes.numel() == 0
        or codes.is_floating_point()
        or codes.is_complex()
        or codes.dtype == torch.bool
    ):
        raise InputError(
            f"codes of shape {tuple(codes.shape)} and type {codes.dtype} cannot be coded: give a matrix of integers"
        )
    if codes.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        return
    limits = torch.iinfo(torch.int32)
    if int(codes.min()) < limits.min or int(codes.max()) > limits.max:
        raise InputError("codes beyond 32 bits cannot be coded: take a larger step")


def _bytes_a_code(codes: npt.NDArray[np.int32]) -> int:
    low, high = int(codes.min()), int(codes.max())
    return next(size for size, kind in TYPES.items() if torch.iinfo(kind).min <= low and high <= torch.iinfo(kind).max)


def _planned(codes: Tensor) -> _Plan:
    classes, bits = sorted_codes(codes)
    columns = np.repeat([0, 1], codes.shape).astype(np.uint8)
    joined = np.where(_energy_row(classes)[0] > tables.REACH, 0, _energy_row(classes)[0] + tables.REACH + 1)
    counts = np.stack([np.bincount(joined[columns == kind], minlength=SYMBOLS) for kind in (0, 1)]).astype(np.int64)
    chosen, energy_bits = fitted(counts, np.zeros(2, dtype=np.uint8))
    energies = Classes(np.zeros(1, dtype=np.uint8), columns, np.array([0, 1], dtype=np.uint8), chosen)
    count = max(1, round(codes.numel() / PART))
    rows = -(-codes.shape[0] // count)
    count = -(-codes.shape[0] // rows)
    lanes, energy_lanes = _lanes(bits / 8 / count), _lanes(energy_bits / 8)
    around = 8 * (3 * (lanes * count + energy_lanes) + 9 * (count + 1) + 32)
    return _Plan(classes, energies, rows, lanes, energy_lanes, bits + energy_bits + around)


def _lanes(size: float) -> int:
    lanes = LANES
    while lanes > 4 and lanes * BYTES_A_LANE > size:
        lanes //= 2
    return lanes


def _energy_row(classes: Classes) -> npt.NDArray[np.int32]:
    return np.concatenate([classes.row, classes.column]).astype(np.int32)[None]


def _slices(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _joined(shape: tuple[int, ...], size: int, plan: _Plan, energies: Part, parts: Sequence[Part]) -> bytes:
    """The stream; its own length stands in its header, so the header is made until that length stays."""
    body = b"".join(part.data.tobytes() for part in (energies, *parts))
    length = 0
    while True:
        writer = BitWriter()
        for value in (length + 1, *shape, size, plan.lanes, plan.energy_lanes, plan.rows):
            writer.gamma(value)
        tables.write(writer, plan.energies.tables)
        _write_runs(writer, plan.classes.of)
        tables.write(writer, plan.classes.tables)
        for part in (energies, *parts):
            writer.gamma(part.words + 1)
            writer.gamma(part.extra + 1)
            writer.binary(zlib.crc32(part.data.data), 32)
        header = writer.data
        if length == FIXED + len(header) + len(body):
            break
        length = FIXED + len(header) + len(body)
    return MAGIC + struct.pack("<II", zlib.crc32(header), len(header)) + header + body


def _write_runs(writer: BitWriter, of: npt.NDArray[np.uint8]) -> None:
    runs = np.bincount(of)
    writer.gamma(len(runs))
    for run in runs.tolist():
        writer.gamma(run)


@dataclass(frozen=True)
class _Header:
    """places: per part its first byte, words, extra bytes and CRC-32."""

    dtype: torch.dtype
    classes: Classes
    rows: int
    lanes: int
    places: list[tuple[int, int, int, int]]


def _read(data: npt.NDArray[np.uint8], shape: tuple[int, int]) -> _Header:
    if data.dtype != np.uint8 or data.ndim != 1 or len(data) < FIXED or data[:4].tobytes() != MAGIC:
        raise InputError("no coded stream: its first bytes are not those of one")
    checksum, length = struct.unpack("<II", data[4:FIXED].tobytes())
    header = data[FIXED : FIXED + length].tobytes()
    if len(header) < length or not _same(header, checksum):
        raise damaged("its header and its checksum disagree")
    reader = BitReader.of(header)
    total, *stored, size, lanes, energy_lanes, rows = (reader.gamma() for _ in range(7))
    if total - 1 != len(data):
        raise damaged(f"it has {len(data)} bytes and should have {total - 1}")
    if tuple(stored) != tuple(shape):
        raise InputError(f"the coded stream holds codes of shape {tuple(stored)}, wanted was {tuple(shape)}")
    if size not in TYPES or not {lanes, energy_lanes} <= {4, 8, 16, 32} or rows > shape[0]:
        raise damaged("its header is impossible")
    columns = np.repeat([0, 1], shape).astype(np.uint8)
    kinds = np.array([0, 1], dtype=np.uint8)
    energies = Classes(np.zeros(1, dtype=np.uint8), columns, kinds, tables.read(reader, 2))
    of = _read_runs(reader)
    chosen = tables.read(reader, int(of[-1]) + 1)
    places, at = [], FIXED + length
    for own in (energy_lanes, *[lanes] * len(_slices(shape[0], rows))):
        words, extra, check = reader.gamma() - 1, reader.gamma() - 1, reader.binary(32)
        places.append((at, words, extra, check))
        at += 4 * own + 2 * words + extra
    if at != len(data):
        raise damaged("its parts are not as long as its header says")
    row = np.empty((1, sum(shape)), dtype=np.int16)
    rans.decode([_cut(data, places[0], energy_lanes)], [energies], energy_lanes, [row], 1)
    row_energy, column_energy = row[0, : shape[0]], row[0, shape[0] :]
    if row.min() < 0 or row.max() > 255 or int(row_energy.max()) + int(column_energy.max()) >= len(of):
        raise damaged("an energy is out of range")
    classes = Classes(row_energy.astype(np.uint8), column_energy.astype(np.uint8), of, chosen)
    return _Header(TYPES[size], classes, rows, lanes, places[1:])


def _read_runs(reader: BitReader) -> npt.NDArray[np.uint8]:
    """Class of every sum of two energies."""
    count = reader.gamma()
    if count > tables.MAX_CLASSES:
        raise damaged("it has more classes than there can be")
    runs = [reader.gamma() for _ in range(count)]
    if sum(runs) > 2 * 255 + 1:
        raise damaged("its classes hold more energies than there can be")
    return np.repeat(np.arange(count), runs).astype(np.uint8)


def _same(data: bytes | memoryview, checksum: int) -> bool:
    return zlib.crc32(data) == checksum


def _cut(data: npt.NDArray[np.uint8], place: tuple[int, int, int, int], lanes: int) -> Part:
    start, words, extra, checksum = place
    part = data[start : start + 4 * lanes + 2 * words + extra]
    if not _same(part.data, checksum):
        raise damaged("a part and its checksum disagree")
    return Part(part, words, extra)
