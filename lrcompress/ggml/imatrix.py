"""llama.cpp's importance matrices: how large the inputs of a weight are on some text, in .gguf or older .dat files."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrcompress.errors import InputError

SUMS, COUNTS = ".in_sum2", ".counts"
CURE = "make it again with llama-imatrix or lrcompress calibrate"
LONGEST = 2**16
"""Bytes of a tensor's name in a .dat file, at most."""


@dataclass(frozen=True)
class Importance:
    """sums (matrices, columns) float32: squares of the inputs, added up; counts (matrices,): over how many rows."""

    sums: Tensor
    counts: Tensor

    def means(self) -> Tensor:
        """(matrices, columns) mean squares; ones for a matrix that no row reached, as llama-quantize has it."""
        reached = self.counts[:, None] > 0
        return torch.where(reached, self.sums / self.counts[:, None].clamp_min(1), 1.0)


def read_imatrix(path: Path) -> dict[str, Importance]:
    """By the GGUF name of the tensor; InputError where the file is none or is damaged."""
    try:
        with path.open("rb") as file:
            new = file.read(4) == b"GGUF"
        found = _read_gguf(path) if new else _read_dat(path.read_bytes())
    except OSError as error:
        raise InputError(f"imatrix {path} cannot be read ({error.strerror}): name a .gguf or .dat file") from error
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"imatrix {path} is none or is damaged ({error}): {CURE}") from error
    for name, one in found.items():
        if not bool(torch.isfinite(one.sums).all()) or bool((one.sums < 0).any()):
            raise InputError(f"imatrix {path} has an impossible number for {name}: {CURE}")
    if not found:
        raise InputError(f"imatrix {path} says nothing of any tensor: {CURE}")
    return found


def _read_gguf(path: Path) -> dict[str, Importance]:
    from gguf import GGUFReader

    tensors = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in GGUFReader(path).tensors}
    found = {}
    for name, sums in tensors.items():
        if name.endswith(SUMS):
            stem = name.removesuffix(SUMS)
            counts = torch.from_numpy(tensors[stem + COUNTS].reshape(-1))
            found[stem] = Importance(torch.from_numpy(sums).reshape(len(counts), -1), counts)
    return found


def _read_dat(data: bytes) -> dict[str, Importance]:
    at, found = 0, {}

    def number() -> int:
        nonlocal at
        (value,) = struct.unpack_from("<i", data, at)
        at += 4
        return int(value)

    for _ in range(number()):
        length = number()
        if not 0 < length <= LONGEST:
            raise ValueError("a name has an impossible length")
        name, at = data[at : at + length].decode(), at + length
        calls, count = number(), number()
        if count < 1 or at + 4 * count > len(data):
            raise ValueError("it ends too early")
        sums = torch.frombuffer(bytearray(data[at : at + 4 * count]), dtype=torch.float32)
        at += 4 * count
        found[name] = Importance(sums[None], torch.tensor([float(max(calls, 1))]))
    return found


def write_imatrix(path: Path, found: Mapping[str, Importance], texts: Sequence[str], chunk: int) -> None:
    """A .gguf file that llama-quantize reads; texts: what was read, chunk: tokens of it that were read at a time."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(texts))
    rows = max(float(one.counts.max()) for one in found.values())
    writer.add_uint32("imatrix.chunk_count", max(1, round(rows / chunk)))
    writer.add_uint32("imatrix.chunk_size", chunk)
    for name in sorted(found):
        one = found[name]
        writer.add_tensor(name + SUMS, one.sums.float().contiguous().numpy())
        writer.add_tensor(name + COUNTS, one.counts.float().reshape(-1, 1).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
