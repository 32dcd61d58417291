"""Experts, which vLLM runs as one fused product of dense weights: stored ones are multiplied out once loaded."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from lrcompress.errors import InputError
from lrcompress.formats import restored, stored_tensors
from lrcompress.protocols import Spec
from lrcompress.vllm_plugin.tensors import WAYS_OUT, Taken, block_of

FUSED = {"w1": "w13", "w3": "w13", "w2": "w2"}
"""vLLM's names of an expert's projections (gate, up, down), and those of the parameters that hold all experts'."""

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
"""What they are called in our files."""


class CompressedExperts(UnquantizedFusedMoEMethod):
    """The experts of a layer of vLLM, some or all of them compressed; `layer` is its RoutedExperts module `prefix`."""

    def __init__(self, taken: Taken, layer: Any, prefix: str) -> None:
        super().__init__(layer.moe_config)
        gated = layer.ckpt_up_proj_name is not None
        names = {"w1": GATE, "w3": UP, "w2": DOWN} if gated else {"w1": UP, "w2": DOWN}
        self.taken = taken
        self.names = {
            (index, shard): f"{prefix}.{index}.{name}"
            for index in range(layer.global_num_experts)
            for shard, name in names.items()
        }
        inside = {name: spec for name, spec in taken.modules.items() if name.startswith(f"{prefix}.")}
        unknown = sorted(inside.keys() - set(self.names.values()))
        if unknown:
            raise InputError(f"{unknown[0]} is compressed, but no expert that vLLM knows: use {WAYS_OUT}")
        self.specs: dict[str, Spec] = inside

    @property
    def supports_eplb(self) -> bool:
        """No: an expert is multiplied out once, for one place."""
        return False

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The dense parameters, and beside them places for what the files have."""
        super().create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs
        )
        keys = {key for spec in self.specs.values() for key in stored_tensors(spec, params_dtype)} - {"weight"}
        for fused in dict.fromkeys(FUSED.values()):
            dense = getattr(layer, f"{fused}_weight")
            dense.weight_loader = self._dense_taker(dense.weight_loader)
            for key in keys:
                slot: Any = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
                slot.weight_loader = self._taker(key)
                # vLLM asks for attributes, whose names may have dots; a module's parameters may not.
                layer.__dict__[f"{fused}_{key}"] = slot
        self.keys = keys

    def _dense_taker(self, load: Any) -> Any:
        def take(param: nn.Parameter, loaded_weight: Tensor, *args: Any, **options: Any) -> Any:
            """An empty tensor stands for a compressed weight, or for those that lie here one by one."""
            return load(param, loaded_weight, *args, **options) if loaded_weight.numel() else True

        return take

    def _taker(self, key: str) -> Any:
        def take(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            self.taken.add(self.names[expert_id, shard_id], key, loaded_weight)
            return True

        return take

    def process_weights_after_loading(self, layer: Any) -> None:
        """Multiply out what is this process's; vLLM cuts it."""
        for fused in dict.fromkeys(FUSED.values()):
            for key in self.keys:
                layer.__dict__.pop(f"{fused}_{key}", None)
        for (index, shard), name in self.names.items():
            spec = self.specs.get(name)
            if spec is not None:
                found = self.taken.tensors_of(name, spec, layer.params_dtype)
                weight = restored(spec.alone(), found, torch.float32).dense().detach()
                parameter = getattr(layer, f"{FUSED[shard]}_weight")
                layer.weight_loader(parameter, weight.to(parameter.dtype), f"{FUSED[shard]}_weight", shard, index)
        self.taken.drop(self.names.values())
        super().process_weights_after_loading(layer)


def experts_method(taken: Taken, layer: Any, prefix: str) -> CompressedExperts | None:
    """For the experts of a block; None where none of them is compressed."""
    held = next((name for name in taken.holders if block_of(name) == block_of(prefix)), None)
    if held is not None:
        taken.rename(held, prefix)
        gate, up, down = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
        theirs = {GATE: gate, UP: up, DOWN: down} if up is not None else {UP: gate, DOWN: down}
        taken.rename_projections(prefix, {ours: name for ours, name in theirs.items() if ours != name})
    compressed = any(name.startswith(f"{prefix}.") for name in taken.modules)
    return CompressedExperts(taken, layer, prefix) if compressed else None
