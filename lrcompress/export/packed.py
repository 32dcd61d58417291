"""Integer weights as compressed-tensors packs them: the layer's tensors and what its config says of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.export.dense import Layers
from lrcompress.export.source import Source
from lrcompress.formats.coded import Coded
from lrcompress.formats.quantized import Quantized
from lrcompress.formats.sum import Sum, part
from lrcompress.linalg.packing import pack, unpack
from lrcompress.protocols import Spec

FOUR, EIGHT = 4, 8
"""Bits that every version of the library packs alike, and that vLLM reads."""


@dataclass(frozen=True)
class Scheme:
    """How a weight is packed; group: inputs of a scale, 0 for all of a row; zeros: with a zero point for each scale."""

    bits: int
    group: int
    zeros: bool

    def as_json(self, targets: list[str]) -> dict[str, Any]:
        """A config group of the layers `targets`."""
        weights: dict[str, Any] = {
            "num_bits": self.bits, "type": "int", "symmetric": not self.zeros, "dynamic": False,
            "strategy": "group" if self.group else "channel", "group_size": self.group or None,
        }  # fmt: skip
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}

    @property
    def text(self) -> str:
        """In words."""
        size = f"groups of {self.group}" if self.group else "one scale a row"
        return f"{self.bits} bits in {size}{' with zero points' if self.zeros else ''}"


@dataclass(frozen=True)
class Codes:
    """weight = scale (code - zero): codes (out, in), scale and zeros (out, groups)."""

    codes: Tensor
    scale: Tensor
    zeros: Tensor
    group: int

    @property
    def signed(self) -> Tensor:
        """(out, in) int16, the codes less their zero points."""
        zeros = self.zeros.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]
        return self.codes.short() - zeros.short()

    @property
    def dense(self) -> Tensor:
        """(out, in)."""
        return self.signed.to(self.scale.dtype) * self.scale.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]


def base_of(spec: Spec) -> Spec:
    """The weight without its correction."""
    return part(spec, "base") if spec.format == Sum.name else spec


def read_codes(source: Source, name: str) -> Codes:
    """Of a quantized weight, or of a sum's quantized base, scales in float32."""
    layer: Any = source.layer(name)
    layer = layer.base if isinstance(layer, Sum) else layer
    spec = base_of(source.manifest.modules[name])
    bits, group = spec.parameters["bits"], min(spec.parameters["group"], spec.shape[1])
    stored = layer.state_dict()
    codes, zeros = unpack(stored["codes"], bits, spec.shape[1]), unpack(stored["zeros"], bits, stored["scale"].shape[1])
    return Codes(codes, stored["scale"], zeros, group)


def rounded(weight: Tensor) -> Codes:
    """A weight (out, in) in 8 bits, one scale a row."""
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    zeros = torch.full_like(scale, 128, dtype=torch.uint8)
    return Codes((weight / scale).round().short() + 128, scale, zeros, weight.shape[1])


class PackedLayers(Layers):
    """Quantized weights, and coded ones rounded, as compressed-tensors packs them; every other one is multiplied out.

    A sum's correction is left out: it is the adapter's. InputError where a weight has no such form.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.schemes: dict[str, Scheme] = {}
        self.rounded: set[str] = set()
        needs: dict[int, bool] = {}
        for name, spec in source.manifest.modules.items():
            base = base_of(spec)
            if base.format == Coded.name:
                self._round(name)
            elif base.format == Quantized.name:
                self._packed(name, base, needs)
            elif spec.format == Sum.name:
                raise InputError(
                    f"{name} has a base stored as {base.format}, which compressed-tensors has no numbers for: "
                    "--to dense has"
                )
        for name, scheme in self.schemes.items():
            if scheme.bits == FOUR:
                self.schemes[name] = Scheme(FOUR, scheme.group, needs[scheme.group])

    def _round(self, name: str) -> None:
        self.rounded.add(name)
        self.schemes[name] = Scheme(EIGHT, 0, zeros=False)

    def _packed(self, name: str, base: Spec, needs: dict[int, bool]) -> None:
        """Without zero points where the codes allow it, which more readers take; alike for all of one group size."""
        found = read_codes(self.source, name)
        signed, width = found.signed, base.shape[1]
        group = 0 if found.group == width else found.group
        if group and width % group:
            raise InputError(
                f"{name} has groups of {group} inputs, which do not divide its {width}; compressed-tensors needs that: "
                "compress with a --base of other groups, or use --to gguf or dense"
            )
        low, high = int(signed.min()), int(signed.max())
        if base.parameters["bits"] <= FOUR:
            needs[group] = needs.get(group, False) or low < -8 or high > 7
            self.schemes[name] = Scheme(FOUR, group, zeros=False)
        elif low >= -128 and high <= 127:
            self.schemes[name] = Scheme(EIGHT, group, zeros=False)
        else:
            self._round(name)

    def codes(self, name: str) -> Codes:
        """What is packed for a layer."""
        if name not in self.rounded:
            return read_codes(self.source, name)
        layer: Any = self.source.layer(name)
        return rounded((layer.base if isinstance(layer, Sum) else layer).dense())

    def weight(self, name: str) -> Tensor:
        """The weight (out, in) that base and adapter multiply by together."""
        layer, found = self.source.layer(name), self.codes(name).dense
        if isinstance(layer, Sum):
            left, right = layer.factors()
            found = found + left @ right
        return found

    def planned(self, name: str, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        if name not in self.schemes:
            return super().planned(name, dtype)
        spec, scheme = self.source.manifest.modules[name], self.schemes[name]
        (rows, width), words = spec.shape, 32 // scheme.bits
        groups = width // scheme.group if scheme.group else 1
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_packed": ((rows, -(-width // words)), torch.int32),
            "weight_scale": ((rows, groups), dtype),
            "weight_shape": ((2,), torch.int64),
        }
        if scheme.zeros:
            shapes["weight_zero_point"] = (-(-rows // words), groups), torch.int32
        if spec.bias:
            shapes["bias"] = (rows,), dtype
        return [(f"{name}.{key}", torch.empty(s, dtype=t, device="meta")) for key, (s, t) in shapes.items()]

    def tensors(self, name: str, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        if name not in self.schemes:
            return super().tensors(name, dtype)
        scheme, found = self.schemes[name], self.codes(name)
        codes = found.codes if scheme.zeros else found.signed + 2 ** (scheme.bits - 1)
        tensors = {
            "weight_packed": words(codes, scheme.bits),
            "weight_scale": found.scale.to(dtype),
            "weight_shape": torch.tensor(codes.shape),
        }
        if scheme.zeros:
            tensors["weight_zero_point"] = words(found.zeros.T, scheme.bits).T.contiguous()
        bias = self.source.layer(name).dense_bias()
        if bias is not None:
            tensors["bias"] = bias.detach().to(dtype)
        return [(f"{name}.{key}", tensor) for key, tensor in tensors.items()]


def words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (..., n) of 4 or 8 bits as int32 (..., ceil(n bits / 32)), the first code in the lowest bits."""
    packed = pack(torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (32 // bits))), bits)
    return packed.contiguous().view(torch.int32)
