"""Sparse dictionary of the transposed weight: W ≈ Dᵀ Sᵀ with exactly s coefficients per input."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.formats.base import FORMATS, StoredLinear, added_bias_bytes, held
from lrcompress.formats.sparse_dictionary import SparseDictionary
from lrcompress.protocols import Spec


@FORMATS.register
class TransposedDictionary(StoredLinear):
    """y = Dᵀ (Sᵀ x) + b with atoms D (k, out) as long as the output is wide, and codes S (in, k).

    `inner` is the sparse dictionary of Wᵀ, with no bias of its own; the manifest says of it what it says of
    `sparse_dictionary`.
    """

    name: ClassVar[str] = "transposed_dictionary"

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.inner = SparseDictionary(inner(spec), dtype)
        del self.inner.weight  # the empty one of this layer stands for the dense parameter
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if spec.bias else None

    @classmethod
    def check(cls, spec: Spec) -> None:
        SparseDictionary.check(inner(spec))

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        return SparseDictionary.bytes(inner(spec), element_size) + added_bias_bytes(spec, element_size)

    @classmethod
    def multiplies(cls, spec: Spec) -> int:
        return int(spec.parameters["atoms"]) * sum(spec.shape)

    @classmethod
    def encode(
        cls, spec: Spec, dictionary: Tensor, codes: Tensor, support: Tensor, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """Stored tensors of codes (in, k), read on support (in, k) bool, @ dictionary (k, out), which is Wᵀ."""
        stored = SparseDictionary.encode(inner(spec), dictionary, codes, support, None)
        named = {f"inner.{key}": tensor for key, tensor in stored.items()}
        return named if bias is None else {**named, "bias": bias}

    def check_indices(self) -> None:
        self.inner.check_indices()

    def dense(self) -> Tensor:
        return self.inner.dense().T

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def kernel(self, rows: int) -> str:
        return self.inner.kernel(rows, transposed=True)

    def touched_bytes(self, rows: int) -> int:
        return self.inner.touched_bytes(rows, transposed=True) + (0 if self.bias is None else held(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, transposed=True)  # called, so that hooks bring its tensors where they are needed
        return y if self.bias is None else y + self.bias.to(y.dtype)


def inner(spec: Spec) -> Spec:
    """The spec of the transposed weight's dictionary."""
    return replace(
        spec, format=SparseDictionary.name, shape=(spec.shape[1], spec.shape[0]), bias=False, added_bias=False
    )
