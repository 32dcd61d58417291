"""vLLM's view of a checkpoint of ours: which layer is compressed, how its tensors are taken in, what it computes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper
from vllm.utils.torch_utils import direct_register_custom_op

from lrcompress.checkpoint.manifest import QUANT_METHOD, Manifest
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.formats import stored_tensors
from lrcompress.protocols import Spec
from lrcompress.vllm_plugin.experts import experts_method
from lrcompress.vllm_plugin.shards import Cut, dense_linear, shard
from lrcompress.vllm_plugin.tensors import WAYS_OUT, Taken, holders, without_place

NAMES = {"q": 0, "k": 1, "v": 2}
"""Shards that vLLM numbers by letters."""

LAYERS: WeakValueDictionary[str, nn.ModuleList] = WeakValueDictionary()
"""The shards of every compressed layer that lives: vLLM's compiler sees one operator, whatever a format does."""


class Compressed(QuantizationConfig):
    """The manifest, and the tensors that have been read."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.taken = Taken(manifest.modules, manifest.experts)

    @classmethod
    def get_name(cls) -> str:
        """As in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Every one that the formats compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Plain products: any GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json has it."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Compressed":
        """The manifest, checked; InputError for what vLLM has no place for."""
        manifest = Manifest.from_json(config)
        found = without_place(manifest.modules, manifest.experts)
        if found is not None:
            raise InputError(f"{found[0]}: vLLM has no place for {found[1]}: use {WAYS_OUT}")
        return cls(manifest)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names as a model of vLLM calls its modules."""
        self.taken.map_names(hf_to_vllm_mapper.map_name)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Where the files' names for experts are to be seen, keep them."""
        if Path(model_name).is_dir():
            names = CheckpointReader(Path(model_name)).names()
            self.taken.holders |= {name: name for name in holders(names)}

    def get_checkpoint_weight_mapper(self) -> Any:
        """Names that vLLM must read as others."""
        return WeightsMapper(orig_to_new_regex=self.taken.renamed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours where a part of the layer is compressed."""
        if isinstance(layer, RoutedExperts):
            return experts_method(self.taken, layer, prefix)
        names = self.parts(prefix)
        if not any(name in self.taken.modules for name in names):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if not isinstance(layer, LinearBase):
            raise InputError(f"{prefix} is compressed, but no linear layer in vLLM: use {WAYS_OUT}")
        return CompressedMethod(self, prefix, names)

    def parts(self, prefix: str) -> list[str]:
        """The modules of the checkpoint that vLLM's layer `prefix` is made of."""
        head, dot, tail = prefix.rpartition(".")
        return [f"{head}{dot}{name}" for name in self.packed_modules_mapping.get(tail, [tail])]


class CompressedMethod(LinearMethodBase):
    """A linear layer of vLLM: one shard, or several that it runs as one, each in a format of its own or dense."""

    def __init__(self, config: Compressed, prefix: str, names: Sequence[str]) -> None:
        self.taken, self.prefix, self.names = config.taken, prefix, names
        self.specs = [config.taken.modules.get(name) for name in names]
        self.sizes: list[int] = []
        self.plain = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters under the names that the files have, each of which takes a tensor as it is."""
        self.dtype, self.sizes, self.input_size = params_dtype, output_partition_sizes, input_size
        keys = {"weight"}
        for spec in filter(None, self.specs):
            keys |= stored_tensors(spec, params_dtype).keys()
        for key in sorted(keys - {"bias"} if layer.has_bias else keys):
            *path, leaf = key.split(".")
            holder = layer
            for step in path:
                if not hasattr(holder, step):
                    holder.add_module(step, nn.Module())
                holder = getattr(holder, step)
            slot: Any = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            slot.weight_loader = self._taker(key)
            holder.register_parameter(leaf, slot)
        self.keys = keys
        if "bias" in keys and not layer.has_bias:
            _keep_bias(layer)

    def _taker(self, key: str) -> Any:
        def take(parameter: nn.Parameter, tensor: Tensor, shard_id: Any = None) -> None:
            index = NAMES.get(shard_id, shard_id) or 0
            if not isinstance(index, int):
                raise InputError(f"{self.prefix}.{key} holds several layers in one, which has no place in vLLM here")
            self.taken.add(self.names[index], key, tensor)

        return take

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the tensors that were taken into layers, cut to what is this process's."""
        for key in self.keys:
            first = key.split(".")[0]
            if first in layer._modules:
                del layer._modules[first]
            elif first in layer._parameters and not (first == "bias" and layer.has_bias):
                layer._parameters[first] = None
        shards, place = [], 0
        for index, (name, spec) in enumerate(zip(self.names, self.specs, strict=True)):
            sizes = self.sizes if len(self.names) == 1 else [self.sizes[index]]
            own = layer.has_bias and (spec is None or "bias" in stored_tensors(spec, self.dtype))
            if layer.has_bias and not own:
                layer.bias.data[place : place + sum(sizes)] = 0
            place += sum(sizes)
            shards.append(self._shard(layer, name, spec, sizes, vllm_bias=own))
            _hand_over(shards[-1], self.plain)
        others = sum(key.partition("#")[0] == self.prefix for key in LAYERS)  # of another model in this process
        self.key = f"{self.prefix}#{others}"
        layer.shards = LAYERS[self.key] = nn.ModuleList(shards)
        self.taken.drop(self.names)

    def _shard(self, layer: nn.Module, name: str, spec: Spec | None, sizes: list[int], *, vllm_bias: bool) -> nn.Module:
        if spec is None:
            weight = self.taken.place(name, "weight", None)
            cut = self._cut(layer, (weight.shape[0], weight.shape[1]), sizes) or Cut()
            weight = cut.of_columns(cut.of_rows(weight))
            bias = None if vllm_bias else self.taken.tensors[name].get("bias")
            return dense_linear(weight.to(self.dtype), None if bias is None else cut.of_rows(bias).to(self.dtype))
        if vllm_bias:
            spec = replace(spec, bias=False)
        found = self.taken.tensors_of(name, spec, self.dtype)
        return shard(spec.alone(), found, self._cut(layer, spec.shape, sizes), self.dtype)

    def _cut(self, layer: Any, shape: tuple[int, int], sizes: list[int]) -> Cut | None:
        """What of a weight of `shape` is this process's, whose outputs there have `sizes`; None for all of it."""
        rank, processes, width = layer.tp_rank, layer.tp_size, getattr(layer, "input_size_per_partition", shape[1])
        if width < shape[1]:
            return Cut(columns=(rank * width, (rank + 1) * width), first=rank == 0)
        if sum(sizes) == shape[0]:
            return None
        rows, start = [], 0
        wholes = [shape[0]] if len(sizes) == 1 else [self._whole(size, shape[0], sizes, processes) for size in sizes]
        for size, whole in zip(sizes, wholes, strict=True):
            copies = max(1, size * processes // whole)  # heads of keys and values, where there are fewer than processes
            begin = start + rank // copies * size
            rows.append(torch.arange(begin, begin + size))
            start += whole
        return Cut(rows=torch.cat(rows))

    def _whole(self, size: int, rows: int, sizes: list[int], processes: int) -> int:
        """Rows in the file of an output that lies in one weight with others."""
        if sum(sizes) * processes != rows:
            raise InputError(
                f"{self.prefix} holds queries, keys and values in one weight, and fewer heads of keys than there are "
                f"processes: serve with fewer, or use {WAYS_OUT}"
            )
        return size * processes

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) to (..., outputs of all shards)."""
        y: Tensor = torch.ops.vllm.lrcompress_linear(x, self.key, sum(self.sizes))
        return y if bias is None else y + bias


def _keep_bias(layer: Any) -> None:
    """vLLM declares that a layer has no bias after its weights: one that compression added keeps its place."""
    declare = layer.register_parameter

    def kept(name: str, parameter: nn.Parameter | None) -> None:
        if name == "bias" and parameter is None:
            del layer.register_parameter
        else:
            declare(name, parameter)

    layer.register_parameter = kept


def _hand_over(shard: nn.Module, plain: UnquantizedLinearMethod) -> None:
    """Let vLLM multiply by the factors in a shard, or by the dense one: on a CPU it packs them first."""
    for linear in [module for module in shard.modules() if type(module) is nn.Linear]:
        linear.weight.data = linear.weight.data.contiguous()
        plain.process_weights_after_loading(linear)
        linear.forward = partial(_plain, plain, linear)  # type: ignore[method-assign]


def _plain(plain: UnquantizedLinearMethod, linear: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = plain.apply(linear, x, linear.bias)
    return y


def _multiply(x: Tensor, name: str, width: int) -> Tensor:
    parts = [part(x) for part in LAYERS[name]]
    # A new tensor in any case: an operator may not return what it was given.
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0].contiguous()


def _shape_only(x: Tensor, name: str, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


direct_register_custom_op(op_name="lrcompress_linear", op_func=_multiply, fake_impl=_shape_only)
