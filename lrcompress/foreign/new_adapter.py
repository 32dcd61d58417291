"""LoRA adapters as PEFT reads them: their config, names and files."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.checkpoint.writer import ShardedWriter
from lrcompress.foreign.adapter import PREFIX, STEM


def patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    """rank_pattern or alpha_pattern that gives every module its value; those that have the default are left out.

    PEFT takes a key for a regular expression that ends a module's name. A name that so taken means other modules too is
    anchored and escaped.
    """
    found = {}
    for name, value in values.items():
        if value != default:
            rule = re.compile(rf"(.*\.)?({name})$")
            alone = all(other == name or not rule.match(other) for other in values) and rule.match(name)
            found[name if alone else f"^{re.escape(name)}"] = value
    return found


def lora_settings(ranks: Mapping[str, int], scalings: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The entries of a config that say how every module is scaled: by 1, or by what `scalings` has for it."""
    largest = max(ranks.values())
    kept = scalings or {}
    alphas = {name: rank * kept[name] if kept.get(name, 1.0) != 1.0 else rank for name, rank in ranks.items()}
    return {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns(ranks, largest),
        "alpha_pattern": patterns(alphas, largest),
        "use_rslora": False,
    }


def resized_config(
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    kept: Mapping[str, tuple[int, float]],
    twins: Mapping[str, tuple[str, float]],
) -> dict[str, Any]:
    """`config` for new factors of `ranks`, every scaling 1, beside updates that are `kept` with rank and scaling.

    twins: see Adapter.twins.
    """
    others = {**kept, **{twin: (ranks[name], scaling) for name, (twin, scaling) in twins.items()}}
    whole = {**ranks, **{name: rank for name, (rank, _) in others.items()}}
    return {**config, **lora_settings(whole, {name: scaling for name, (_, scaling) in others.items()})}


def new_config(settings: Mapping[str, Any], base: str, modules: Collection[str]) -> dict[str, Any]:
    """adapter_config.json of an adapter on linear layers, whose ranks and scalings `settings` has.

    Weights of stored formats are (out, in) where the dense layer is a Conv1D too, so fan_in_fan_out is false.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **settings,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def lora_tensors(module: str, right: Tensor, left: Tensor, twin: str | None = None) -> list[tuple[str, Tensor]]:
    """A (r, in) and B (out, r) of a module, and of the embedding `twin` that is tied to it, under PEFT's names."""
    stem = f"{PREFIX}{module}"
    found = [(f"{stem}.lora_A.weight", right), (f"{stem}.lora_B.weight", left)]
    if twin is not None:
        names = (f"{PREFIX}{twin}.lora_embedding_A", f"{PREFIX}{twin}.lora_embedding_B")
        found += [(names[0], left.T.contiguous()), (names[1], right.T.contiguous())]
    return found


@dataclass(frozen=True)
class Shape:
    """Of a module's factors: shape (out, in), rank, dtypes of A and of B, the embedding that is tied to it."""

    shape: tuple[int, int]
    rank: int
    dtypes: tuple[torch.dtype, torch.dtype]
    twin: str | None = None

    def tensors(self, module: str) -> list[tuple[str, Tensor]]:
        """`lora_tensors` on the meta device."""
        right = torch.empty(self.rank, self.shape[1], dtype=self.dtypes[0], device="meta")
        left = torch.empty(self.shape[0], self.rank, dtype=self.dtypes[1], device="meta")
        return lora_tensors(module, right, left, self.twin)


def write_adapter(
    folder: Path, others: Mapping[str, Tensor], shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """adapter_model.safetensors: `others`, meta tensors by name, then the factors of `shapes`; so come `tensors`."""
    planned = [*others.items(), *(entry for module, shape in shapes.items() for entry in shape.tensors(module))]
    writer = ShardedWriter(folder, planned, 2**63, stem=STEM)
    writer.write(tensors)
    writer.close()
