"""Weights stored as fp8 with a scale per block of them, as DeepSeek-V3 ships: read as what they stand for.

value = code * scale of its block; blocks at the edges may be cut. Source: weight_dequant of DeepSeek-V3, kernel.py.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.errors import InputError

METHOD = "fp8"
"""quant_method in config.json."""
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
POWERS_OF_TWO = "F8_E8M0"
"""The dtype of scales without a mantissa."""
SCALES = ("{name}_scale_inv", "{stem}.qscale_{leaf}", "{stem}.scale")
"""Names of the scale of tensor `name` = `stem`.`leaf`."""
OF_INPUTS = ("activation_scale", "input_scale", "qscale_act")
"""Last parts of names of what the inputs of a layer are rounded by where it is run in fp8: no part of its weight."""
BLOCK = (128, 128)


def scale_dtypes() -> dict[str, torch.dtype]:
    """Dtypes by name that only fp8 checkpoints have."""
    powers = getattr(torch, "float8_e8m0fnu", None)  # torch 2.7 brought it
    return DTYPES if powers is None else {**DTYPES, POWERS_OF_TWO: powers}


@dataclass(frozen=True)
class Scaled:
    """A tensor's scale by its name, the block (rows, columns) of one number of it, and the dtype to read as."""

    scale: str
    block: tuple[int, int]
    dtype: torch.dtype

    def multiplied(self, codes: Tensor, scale: Tensor) -> Tensor:
        """codes (..., out, in) times its scale (..., blocks of out, blocks of in), in `dtype`."""
        factors = scale.float()
        if scale.dtype == torch.uint8:  # exponents of two
            factors = (factors - 127).exp2()
        if scale.dim() >= 2:
            for dimension, size in zip((-2, -1), self.block, strict=True):
                factors = factors.repeat_interleave(size, dimension)
            factors = factors[..., : codes.shape[-2], : codes.shape[-1]]
        return (codes.float() * factors).to(self.dtype)


def find_scaled(folder: Path, metas: Mapping[str, Tensor]) -> dict[str, Scaled]:
    """The tensors in fp8, and how each is read; InputError where one has no scale, or one that does not fit it."""
    codes = [name for name, meta in metas.items() if meta.dtype in DTYPES.values()]
    if not codes:
        return {}
    block, dtype = _asked(folder)
    return {name: _scaled(folder, name, metas, block, dtype) for name in codes}


def beside(scaled: Mapping[str, Scaled], names: Iterable[str]) -> set[str]:
    """Those of `names` that only say how tensors in fp8 are meant or run."""
    stems = {name.rpartition(".")[0] for name in scaled}
    inputs = {name for name in names if name.rpartition(".")[2] in OF_INPUTS and name.rpartition(".")[0] in stems}
    return inputs | {entry.scale for entry in scaled.values()}


def readable(settings: Any) -> bool:
    """Whether a quantization_config speaks of fp8 weights that are read here."""
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD and _codes_alone(settings)


def _codes_alone(settings: dict[str, Any]) -> bool:
    return settings.get("expert_dtype", METHOD) == METHOD  # else experts are packed in four bits


def _asked(folder: Path) -> tuple[tuple[int, int] | None, torch.dtype]:
    """The block that config.json names, None for none, and the dtype that the model is meant to have."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf8"))
        settings = config.get("quantization_config")
        block = settings.get("weight_block_size", BLOCK) if isinstance(settings, dict) else BLOCK
        kind = config.get("dtype") or config.get("torch_dtype")
    except (OSError, ValueError, RecursionError, AttributeError):  # said elsewhere
        block, kind = BLOCK, None
    sizes = block if isinstance(block, list | tuple) and len(block) == 2 else (0, 0)
    sound = all(isinstance(size, int) and size > 0 for size in sizes)
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    return (sizes[0], sizes[1]) if sound else None, dtypes.get(str(kind), torch.bfloat16)


def _scaled(
    folder: Path, name: str, metas: Mapping[str, Tensor], block: tuple[int, int] | None, dtype: torch.dtype
) -> Scaled:
    stem, _, leaf = name.rpartition(".")
    named = [pattern.format(name=name, stem=stem, leaf=leaf) for pattern in SCALES]
    scale = next((found for found in named if found in metas), None)
    if scale is None:
        raise InputError(
            f"tensor {name} in {folder} is in fp8 and has no scale ({named[0]}): what it stands for is not known, "
            "download it again"
        )
    shape, grid, kind = tuple(metas[name].shape), tuple(metas[scale].shape), metas[scale].dtype
    if not kind.is_floating_point and kind != torch.uint8:
        raise InputError(f"tensor {scale} in {folder} has dtype {kind}, no scale of fp8: start from bfloat16 weights")
    found = _fitting(shape, grid, block)
    if found is None:
        raise InputError(
            f"tensor {name} in {folder} of shape {shape} has a scale of shape {grid}, which is no grid of its blocks"
        )
    return Scaled(scale, found, dtype)


def _fitting(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """The block with which a tensor of `shape` has a scale of shape `grid`: the one asked for, else of equal parts."""
    if math.prod(grid) == 1 and len(shape) >= 2:
        return shape[-2], shape[-1]
    if len(shape) < 2 or len(grid) != len(shape) or grid[:-2] != shape[:-2] or 0 in grid:
        return None
    equal = -(-shape[-2] // grid[-2]), -(-shape[-1] // grid[-1])
    for sizes in (block, equal):
        if sizes is not None and (-(-shape[-2] // sizes[0]), -(-shape[-1] // sizes[1])) == grid[-2:]:
            return sizes
    return None
