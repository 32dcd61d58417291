"""The one place that chooses devices and dtypes."""

import os

import torch

from lrcompress.errors import InputError

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
        torch.empty(1, device=device)
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


def decomposition_device(device: torch.device) -> torch.device:
    """Where float64 decompositions run: on the device unless it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def memory_hint(device: torch.device) -> str:
    """What to say when memory ran out."""
    return f"out of memory on {device}: use fewer --samples or a shorter --seqlen"
