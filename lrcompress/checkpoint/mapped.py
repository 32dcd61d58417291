"""Files that loaded tensors still lie in: a file that is mapped stays in memory as long as one tensor of it is used."""

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class Mapping:
    """A mapped file: first address and the one behind the last; whether this process has written to its pages."""

    start: int
    stop: int
    path: Path
    written: bool


def release_unused(model: nn.Module) -> None:
    """Give back the pages of mapped safetensors files that no tensor of `model` lies in, just after it was loaded.

    What was decoded or converted is read no more, yet would count as resident. Nothing is lost: pages that are needed
    after all are read from the file again. A mapping with pages of its own is left alone, for another model of this
    process may have changed numbers there.
    """
    advise = _madvise()
    if advise is None:
        return
    used: set[tuple[int, int]] = set()
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.device.type == "cpu" and tensor.nbytes:
                storage = tensor.untyped_storage()
                first = storage.data_ptr() + tensor.storage_offset() * tensor.itemsize
                size = tensor.nbytes if tensor.is_contiguous() else storage.nbytes()
                used.add((int(first), int(first + size)))
    for mapping in mapped_files():
        inside = sorted((max(a, mapping.start), min(b, mapping.stop)) for a, b in used)
        inside = [(a, b) for a, b in inside if a < b]
        if not inside or mapping.written:
            continue
        behind = mapping.start
        for first, last in [*inside, (mapping.stop, mapping.stop)]:
            start, stop = -(-behind // mmap.PAGESIZE) * mmap.PAGESIZE, first // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                advise(start, stop - start, mmap.MADV_DONTNEED)
            behind = max(behind, last)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's, where the system says what is mapped."""
    if not Path("/proc/self/smaps").exists():
        return None
    found = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found  # type: ignore[no-any-return]


def mapped_files() -> list[Mapping]:
    """Every mapped safetensors file; none where a system does not tell."""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf8").splitlines()
    except OSError:
        return []
    found: list[Mapping] = []
    current: tuple[int, int, Path] | None = None
    for line in lines:
        parts = line.split(maxsplit=5)
        if "-" in parts[0]:  # the head of a mapping: its addresses, and after four more fields its path
            current = None
            if len(parts) == 6 and parts[5].endswith(".safetensors"):
                start, stop = (int(address, 16) for address in parts[0].split("-"))
                current = (start, stop, Path(parts[5]))
        elif current is not None and parts[0] == "Anonymous:":
            found.append(Mapping(*current, written=parts[1] != "0"))
    return found
