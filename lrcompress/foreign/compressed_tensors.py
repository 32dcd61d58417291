"""compressed-tensors checkpoints as bases: integer weights, unpacked by the library itself."""

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.foreign.quantised import Dense, ForeignWeights
from lrcompress.linalg.packing import UNITS

LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized")
STRATEGIES = ("group", "channel", "tensor")


def read_settings(folder: Path, settings: dict[str, Any]) -> Any:
    """The library's QuantizationConfig; InputError where a weight is stored in another way than `quantized` holds."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise InputError(
            f"base {folder} is a compressed-tensors checkpoint, which needs its library: pip install compressed-tensors"
        )
    from compressed_tensors.quantization import QuantizationConfig

    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise InputError(
            f"base {folder} stores sparse weights as {sparsity['format']}, which compressed-tensors no longer unpacks: "
            "prune anew with --base wanda:2:4 or sparsegpt:2:4"
        )
    for key in ("transform_config", "kv_cache_scheme"):
        if settings.get(key):
            raise InputError(f"base {folder} has a {key}: only checkpoints that quantise nothing but weights are read")
    known = {key: settings[key] for key in ("config_groups", "ignore", "format") if settings.get(key) is not None}
    try:
        config = QuantizationConfig(**known)
    except (ValueError, NotImplementedError, KeyError, TypeError) as error:
        raise InputError(
            f"base {folder} has a quantization_config that compressed-tensors refuses: {_reason(error)}"
        ) from error
    for group, scheme in config.config_groups.items():
        problem = _problem(scheme, scheme.format or config.format)
        if problem:
            raise InputError(f"base {folder}: {group} of its quantization_config {problem}")
    return config


def _problem(scheme: Any, layout: str) -> str | None:
    """Why a scheme cannot be repacked."""
    weights = scheme.weights
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "quantises activations too: only weights are read"
    if weights is None:
        return "quantises no weights"
    layout = str(getattr(layout, "value", layout))
    if layout not in LAYOUTS:
        return f"has the format {layout}: {', '.join(LAYOUTS)} are read"
    if weights.type != "int" or weights.num_bits not in UNITS:
        return f"has weights of {weights.num_bits} bits ({weights.type}): int of {', '.join(map(str, UNITS))} is read"
    if weights.strategy not in STRATEGIES or weights.dynamic:
        return f"has the strategy {weights.strategy}: {', '.join(STRATEGIES)} are read"
    return None


def _reason(error: Exception) -> str:
    """The first mistake that the library names, in one line."""
    if isinstance(error, pydantic.ValidationError):
        return str(error.errors()[0]["msg"])
    return " ".join(str(error).split()) or type(error).__name__


class CompressedTensors(ForeignWeights):
    """Signed codes of the library become unsigned ones, so that a symmetric weight has the middle as its zero.

    `weight_packed` (out, words) int32 holds the codes densely along the row, or `weight` (out, in) int8 one each;
    `weight_scale` is (out, groups), (out, 1) or one number; `weight_zero_point` likewise, packed along the outputs.
    """

    marker: ClassVar[str] = "weight_scale"
    scale_leaf: ClassVar[str] = "weight_scale"

    def __init__(self, folder: Path, reader: CheckpointReader, dense: Dense, config: Any) -> None:
        self._config = config
        super().__init__(folder, reader, dense)

    def layout(self, name: str) -> tuple[tuple[int, int], int, int]:
        weights = self._weights(name)
        bits = weights.num_bits
        if self._packed(name):
            rows, width = (int(n) for n in self.read(name, "weight_shape").tolist())
            self.expect(name, "weight_packed", (rows, -(-width * bits // 32)), torch.int32)
        else:
            meta = self.meta(name, "weight")
            if meta.dtype != torch.int8 or meta.dim() != 2:
                raise self.refuse(
                    name, f"is not compressed (its weight is {meta.dtype}): save the checkpoint compressed"
                )
            rows, width = meta.shape
        group = weights.group_size if weights.strategy == "group" else width
        groups = -(-width // group)
        numbers = 1 if weights.strategy == "tensor" else rows * groups
        if self.meta(name, "weight_scale").numel() != numbers:
            raise self.refuse(
                name, f"has scales of shape {tuple(self.meta(name, 'weight_scale').shape)}, not {numbers}"
            )
        self.check_order(name, "weight_g_idx", width, group)
        return (rows, width), bits, group

    def decode(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        from compressed_tensors.compressors import unpack_from_int32

        weights, spec = self._weights(name), self.specs[name]
        middle = 2 ** (weights.num_bits - 1)
        packed = self._packed(name)
        if packed:
            codes = unpack_from_int32(self.read(name, "weight_packed"), weights.num_bits, torch.Size(spec.shape))
        else:
            codes = self.read(name, "weight")
        scale = self._per_group(name, self.read(name, "weight_scale"))
        zeros = torch.zeros(scale.shape, dtype=torch.int32)
        if self.has(name, "weight_zero_point") or not weights.symmetric:
            stored = self.read(name, "weight_zero_point")
            if packed and not weights.symmetric and weights.strategy != "tensor":
                stored = unpack_from_int32(stored, weights.num_bits, scale.shape, packed_dim=0)
            zeros = self._per_group(name, stored).to(torch.int32)
        return codes.to(torch.int32) + middle, scale, zeros + middle

    def _per_group(self, name: str, values: Tensor) -> Tensor:
        """(out, groups) of one number per group, per row or in all."""
        (rows, width), group = self.specs[name].shape, self.specs[name].parameters["group"]
        groups = -(-width // group)
        return values.expand(rows, groups) if values.numel() == 1 else values.reshape(rows, groups)

    def _packed(self, name: str) -> bool:
        return self.has(name, "weight_packed")

    def _weights(self, name: str) -> Any:
        """The QuantizationArgs of a layer's weight."""
        from compressed_tensors.utils.match import is_match

        for scheme in self._config.config_groups.values():
            if any(is_match(known, self.module(name), scheme.targets) for known in (name, self.stems[name])):
                return scheme.weights
        raise self.refuse(name, "is in no group of the quantization_config")
