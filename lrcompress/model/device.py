"""The one place that chooses devices and dtypes."""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from lrcompress.errors import InputError, ResourceError
from lrcompress.precision import has_float64, wide

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` is the machine's accelerator where there is one; an unusable device is an InputError."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is not None and "LOCAL_RANK" in os.environ:  # torchrun: an accelerator each
            return torch.device(found.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}): try --device auto") from error
    return device


def resolve_dtype(name: str, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype to write; `auto` is the checkpoint's own."""
    if name == "auto":
        return checkpoint
    if name not in DTYPES:
        raise InputError(f"--dtype {name!r} is unknown: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def compute_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype to run blocks in: float32 on CPU, the checkpoint's own where half precision pays."""
    return torch.float32 if device.type == "cpu" else checkpoint


def statistics_device(name: str) -> torch.device:
    """As `resolve_device`; `auto` is the CPU where the accelerator has no float64, for nothing was measured on such.

    InputError too where the environment asks for a wide dtype that the device has not.
    """
    device = resolve_device(name)
    if name == "auto" and not has_float64(device):
        device = torch.device("cpu")
    wide(device)
    return device


def double_device(device: torch.device) -> torch.device:
    """Where float64 numbers go: on the device unless it has none."""
    return device if has_float64(device) else torch.device("cpu")


@contextmanager
def fast_float32() -> Iterator[None]:
    """Float32 products on the CPU by oneDNN's kernels where those are as exact as BLAS's, which knows fewer processors.

    torch takes oneDNN only where operands may be rounded to bfloat16, but without matrix units oneDNN multiplies in
    float32 all the same: then twice as fast on AMD's processors. A single row is slower: generate text outside. With an
    accelerator, which would round, nothing changes.
    """
    if not _onednn_is_exact():
        yield
        return
    with _rounding_allowed():
        yield


@contextmanager
def _rounding_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _onednn_is_exact() -> bool:
    """Whether products of float32 keep its precision where they may be rounded to bfloat16: the same on every run."""
    if torch.accelerator.is_available() or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 512, generator=generator) for n in (384, 256))
    with _rounding_allowed():
        found = [nn.functional.linear(rows, weight), rows.T @ rows]
    exact = [rows.double() @ weight.double().T, rows.double().T @ rows.double()]
    return all(float((f - e).norm() / e.norm()) < 1e-5 for f, e in zip(found, exact, strict=True))


def release_freed() -> None:
    """Give the pages of freed tensors back to the system.

    glibc keeps what lies between allocations that live on: several times a small block after two dozen of them.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # another system's C library
        return None


OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""How the libraries say it where they raise an error of no kind of its own."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that host or device memory ran out; on the host torch raises a bare RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Lack of memory as a ResourceError that says `message`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(message) from error
