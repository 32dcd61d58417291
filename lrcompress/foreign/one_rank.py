"""Adapters of one rank and scaling 1, which every reader of adapters takes alike (docs/serving.md)."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.foreign.adapter import PREFIX

RANK_STEP = 8
"""Servers reserve room for adapters in such steps."""

ADAPTER_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""What --dtype may be; auto is that of the numbers that are there."""


def one_rank(ranks: Collection[int]) -> int:
    """The rank that updates of `ranks` are all padded to: the largest, as a multiple of 8."""
    return -(-max(ranks) // RANK_STEP) * RANK_STEP


def padded(right: Tensor, left: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, ...) and B (..., r, ...), the rank its second dimension, with components of zeros up to `rank`."""
    missing = rank - right.shape[0]
    shapes = (missing, *right.shape[1:]), (left.shape[0], missing, *left.shape[2:])
    return torch.cat([right, right.new_zeros(shapes[0])]), torch.cat([left, left.new_zeros(shapes[1])], dim=1)


def levelled(name: str, tensor: Tensor, kept: Mapping[str, tuple[int, float]], rank: int) -> Tensor:
    """Tensor `name` of an adapter of one rank and scaling 1: those of updates that are `kept` (rank and scaling by
    module) are scaled and padded, any other stays as it is."""
    stem, found, leaf = name.rpartition(".lora_")
    own, scaling = kept.get(stem.removeprefix(PREFIX), (0, 1.0)) if found else (0, 1.0)
    if not own:
        return tensor
    if leaf.endswith(("A.weight", "embedding_A")):
        return torch.cat([tensor, tensor.new_zeros(rank - own, *tensor.shape[1:])])
    scaled = tensor if scaling == 1.0 else (scaling * tensor.double()).to(tensor.dtype)
    if leaf.endswith("bias"):
        return scaled
    return torch.cat([scaled, scaled.new_zeros(scaled.shape[0], rank - own, *scaled.shape[2:])], dim=1)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of an adapter in the dtype that was asked for, if one was and it is of numbers."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def adapter_dtype(name: str) -> torch.dtype | None:
    """What --dtype says of an adapter: None for auto; InputError for what not every reader of adapters takes."""
    if name not in ADAPTER_DTYPES:
        raise InputError(f"--dtype {name} is none for an adapter: use one of {', '.join(ADAPTER_DTYPES)}")
    return ADAPTER_DTYPES[name]


def level_config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """`config` for updates that all have `rank` and scaling 1: what every reader of adapters takes alike.

    llama.cpp's converter and SGLang look at r and lora_alpha alone, whatever the patterns and use_rslora say.
    """
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {**config, **plain}


def check_twins(label: str, twins: Mapping[str, tuple[str, float]]) -> None:
    """InputError where an update of an adapter of one scaling is to be scaled by two numbers; see Adapter.twins."""
    name = next((name for name, (_, scaling) in twins.items() if scaling != 1.0), None)
    if name is not None:
        raise InputError(
            f"{name} in {label} and the embeddings that it shares its factors with are scaled by two numbers, "
            "for which an adapter of one scaling has no place: pass --per-module-ranks"
        )
