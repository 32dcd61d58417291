"""Low rank: W ≈ B A in r(m+n) numbers."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.formats.base import FORMATS, FactorPair, StoredLinear, added_bias_bytes, check_rank, held
from lrcompress.protocols import Spec


@FORMATS.register
class LowRank(StoredLinear):
    """y = B (A x) + b with A (r, in) and B (out, r), named as in PEFT's LoRA."""

    name: ClassVar[str] = "low_rank"

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        rank = spec.parameters["rank"]
        self.A = nn.Linear(self.in_features, rank, bias=False, dtype=dtype)
        self.B = nn.Linear(rank, self.out_features, bias=spec.bias, dtype=dtype)

    @classmethod
    def check(cls, spec: Spec) -> None:
        check_rank(spec)

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        rank = spec.parameters["rank"]
        return rank * sum(spec.shape) * element_size + added_bias_bytes(spec, element_size)

    @classmethod
    def multiplies(cls, spec: Spec) -> int:
        return int(spec.parameters["rank"]) * sum(spec.shape)

    @classmethod
    def encode(cls, left: Tensor, right: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of left (m, r) @ right (r, n); each component's scale is split evenly over both factors."""
        scale = (right.norm(dim=1) / left.norm(dim=0).clamp_min(torch.finfo(left.dtype).tiny)).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        stored = {"A.weight": right / scale[:, None], "B.weight": left * scale}
        return stored if bias is None else {**stored, "B.bias": bias}

    def factor_pair(self) -> FactorPair:
        return FactorPair("B.weight", "A.weight")

    def dense(self) -> Tensor:
        return self.B.weight @ self.A.weight

    def dense_bias(self) -> Tensor | None:
        return self.B.bias

    def bias_tensors(self, bias: Tensor) -> dict[str, Tensor]:
        return {"B.bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.B(self.A(x))
        return y

    def touched_bytes(self, rows: int) -> int:
        return held(*self.parameters())
