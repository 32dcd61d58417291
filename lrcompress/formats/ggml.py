"""Ggml: a weight in llama.cpp's own blocks, byte for byte as a GGUF file holds them."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.formats.base import FORMATS, LeafLinear, added_bias_bytes
from lrcompress.ggml.types import BLOCK_TYPES, BlockType
from lrcompress.protocols import Spec


@FORMATS.register
class Ggml(LeafLinear):
    """blocks: (out, bytes of a row) uint8, rows in the order of the model's own weight; decoded at every call."""

    name: ClassVar[str] = "ggml"
    blocks: Tensor

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.kind = _kind(spec)
        row = self.kind.bytes_of(1, self.in_features)
        self.register_buffer("blocks", torch.empty(self.out_features, row, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if spec.bias else None

    @classmethod
    def check(cls, spec: Spec) -> None:
        name = spec.parameters.get("type")
        if not isinstance(name, str) or name not in BLOCK_TYPES:
            raise InputError(f"format ggml has blocks of type {name!r}: {', '.join(BLOCK_TYPES)} are possible")
        if not _kind(spec).fits(spec.shape[1]):
            raise InputError(
                f"format ggml of shape {spec.shape} has blocks of {_kind(spec).block} inputs: write it again"
            )

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        return _kind(spec).bytes_of(*spec.shape) + added_bias_bytes(spec, element_size)

    @classmethod
    def encode(cls, blocks: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of packed rows (out, bytes of a row)."""
        return {"blocks": blocks} if bias is None else {"blocks": blocks, "bias": bias}

    def touched_bytes(self, rows: int) -> int:
        held = self.blocks.numel() + (0 if self.bias is None else self.bias.numel() * self.bias.itemsize)
        return held + 2 * self.out_features * self.in_features * self.weight.itemsize

    def dense(self) -> Tensor:
        return self.kind.dense(self.blocks).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(), self.bias)

    def dense_bias(self) -> Tensor | None:
        return self.bias


def _kind(spec: Spec) -> BlockType:
    return BLOCK_TYPES[spec.parameters["type"]]
