"""Quantized: every weight a code of 2, 3, 4 or 8 bits, every group of a row with a scale and a zero point."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.formats.base import FORMATS, RowsLinear, added_bias_bytes
from lrcompress.kernels.products import quantized
from lrcompress.kernels.rows import QuantizedRows
from lrcompress.linalg.packing import UNITS, pack, packed_length
from lrcompress.protocols import Spec


@FORMATS.register
class Quantized(RowsLinear):
    """W = scale * (code - zero), scale and zero per group of `group` neighbouring inputs of a row.

    codes: (out, bytes of in codes) and zeros: (out, bytes of the groups' codes), uint8, packed along the row;
    scale: (out, groups). The last group of a row may be shorter.
    """

    name: ClassVar[str] = "quantized"
    codes: Tensor
    zeros: Tensor

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.bits, self.group, self.groups = _layout(spec)
        code_bytes, zero_bytes = packed_length(self.in_features, self.bits), packed_length(self.groups, self.bits)
        self.register_buffer("codes", torch.empty(self.out_features, code_bytes, dtype=torch.uint8))
        self.register_buffer("zeros", torch.empty(self.out_features, zero_bytes, dtype=torch.uint8))
        self.scale = nn.Parameter(torch.empty(self.out_features, self.groups, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if spec.bias else None

    @classmethod
    def check(cls, spec: Spec) -> None:
        bits, group = spec.parameters.get("bits"), spec.parameters.get("group")
        if type(bits) is not int or bits not in UNITS:
            raise InputError(f"format quantized has {bits!r} bits: {', '.join(map(str, UNITS))} are possible")
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise InputError(f"format quantized has groups of {group!r}: a whole number from 1 is needed")

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        bits, _, groups = _layout(spec)
        row = packed_length(spec.shape[1], bits) + packed_length(groups, bits) + groups * element_size
        return spec.shape[0] * row + added_bias_bytes(spec, element_size)

    @classmethod
    def encode(cls, codes: Tensor, scale: Tensor, zeros: Tensor, bits: int, bias: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of codes (out, in), scale (out, groups) and zeros (out, groups), codes of `bits` bits."""
        stored = {"codes": pack(codes, bits), "zeros": pack(zeros, bits), "scale": scale.float()}
        return stored if bias is None else {**stored, "bias": bias}

    def stored_rows(self) -> QuantizedRows:
        return QuantizedRows(self.codes, self.zeros, self.scale, self.bits, self.in_features, self.group)

    def product(self, x: Tensor) -> Tensor:
        return quantized(x, self.stored_rows())

    def by_torch(self) -> list[Tensor]:
        return []

    def dense_bias(self) -> Tensor | None:
        return self.bias


def _layout(spec: Spec) -> tuple[int, int, int]:
    """Bits, inputs per group (at most the row's), groups per row."""
    group = min(spec.parameters["group"], spec.shape[1])
    return spec.parameters["bits"], group, -(-spec.shape[1] // group)
