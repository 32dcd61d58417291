"""Low rank: W ≈ B A in r(m+n) numbers."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.formats.base import (
    FORMATS,
    FactorPair,
    KernelLinear,
    StoredLinear,
    added_bias_bytes,
    check_rank,
    empty_bias,
    held,
)
from lrcompress.kernels.products import linear
from lrcompress.protocols import Spec

LENT = "lrcompress_lent"
"""Attribute of a layer whose weight other modules multiply by too."""


@FORMATS.register
class LowRank(StoredLinear):
    """y = B (A x) + b with A (r, in) and B (out, r), named as in PEFT's LoRA.

    Where the spec names a module in `shared`, A is that module's, or its pivot rows where it is `pivoted`: this one has
    none, until it is told to `follow` it.
    """

    name: ClassVar[str] = "low_rank"
    bias = empty_bias

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        rank = spec.parameters["rank"]
        self._owner: tuple[StoredLinear, ...] = ()
        if spec.owner is None:
            self.A = KernelLinear(self.in_features, rank, bias=False, dtype=dtype)
        self.B = KernelLinear(rank, self.out_features, bias=spec.bias, dtype=dtype)

    @classmethod
    def check(cls, spec: Spec) -> None:
        check_rank(spec, largest=spec.shape[1])  # one that is shared may be higher than the least of its weights

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        rank = spec.parameters["rank"]
        size = sum(spec.shape) if spec.owner is None else spec.shape[0]
        return rank * size * element_size + added_bias_bytes(spec, element_size)

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

    def follow(self, owner: StoredLinear) -> None:
        """In a tuple, so that the owner is no submodule, is copied with the model, and may be moved and trained."""
        same = owner.spec.rank == self.spec.rank and owner.in_features == self.in_features
        if owner.right_factor() is None or not same:
            raise InputError(f"the manifest shares a factor of {self.spec} that {owner.spec} cannot have")
        self._owner = (owner,)
        setattr(owner.right_factor(), LENT, True)

    def right_factor(self) -> nn.Linear | None:
        return self.A if self.spec.owner is None else None

    def whole_state(self) -> dict[str, Tensor]:
        return {**self.state_dict(), "A.weight": self.right(self.B.weight).detach()}

    def right(self, like: Tensor) -> Tensor:
        """A (r, in) on the device of `like`, whoever stores it."""
        if self.spec.owner is None:
            return self.A.weight
        if not self._owner:
            raise RuntimeError(f"the right factor lies in {self.spec.owner}: call follow with that module first")
        factor = self._owner[0].right_factor()
        assert factor is not None
        if factor.weight.is_meta and hasattr(factor, "_hf_hook"):
            from accelerate.utils import align_module_device

            with align_module_device(factor, like.device):  # offloaded: back on the meta device afterwards
                return factor.weight.clone()
        return factor.weight.to(like.device)

    def factor_pair(self) -> FactorPair | None:
        return FactorPair("B.weight", "A.weight") if self.spec.owner is None else None

    def dense(self) -> Tensor:
        return self.B.weight @ self.right(self.B.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        """left (out, r) and right (r, in) whose product is the weight."""
        return self.B.weight, self.right(self.B.weight)

    def dense_bias(self) -> Tensor | None:
        return self.B.bias

    def bias_tensors(self, bias: Tensor) -> dict[str, Tensor]:
        return {"B.bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        latent = self.A(x) if self.spec.owner is None else linear(x, self.right(x))
        y: Tensor = self.B(latent)
        return y

    def kernel(self, rows: int) -> str:
        return self.B.kernel(rows)

    def touched_bytes(self, rows: int) -> int:
        shared = () if self.spec.owner is None else (self.right(self.B.weight),)
        return held(*self.parameters(), *shared)
