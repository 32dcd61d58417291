"""Pivoted: a rank-r matrix losslessly in r(m+n-r) numbers (PIFA, arXiv 2501.19090).

r rows of W are kept as they are; every other row is a combination C of them. Unlike two factors it is never
larger than the dense matrix.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.formats.base import (
    FORMATS,
    FactorPair,
    KernelLinear,
    StoredLinear,
    added_bias_bytes,
    check_rank,
    empty_bias,
    held,
    index_dtype,
)
from lrcompress.kernels.placing import placed
from lrcompress.linalg.pivoting import pivot_rows
from lrcompress.protocols import Spec


@FORMATS.register
class Pivoted(StoredLinear):
    """y_p = W_p x, y_rest = C y_p, both put into place by `order` (out,).

    `pivot` holds W_p (r, in), `rest` holds C (out - r, r). The bias is folded in: pivot.bias = b_p and
    rest.bias = b_rest - C b_p.
    """

    name: ClassVar[str] = "pivoted"
    bias = empty_bias
    order: Tensor

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        rank = spec.parameters["rank"]
        self.pivot = KernelLinear(self.in_features, rank, bias=spec.bias, dtype=dtype)
        self.rest = KernelLinear(rank, self.out_features - rank, bias=spec.bias, dtype=dtype)
        self.register_buffer("order", torch.empty(self.out_features, dtype=index_dtype(self.out_features)))
        self._checked: tuple[Tensor, tuple[int, int], bool] | None = None

    @classmethod
    def check(cls, spec: Spec) -> None:
        check_rank(spec, largest=min(spec.shape[0] - 1, spec.shape[1]))

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        (m, n), rank = spec.shape, spec.parameters["rank"]
        index = m * index_dtype(m).itemsize
        return rank * (m + n - rank) * element_size + index + added_bias_bytes(spec, element_size)

    @classmethod
    def multiplies(cls, spec: Spec) -> int:
        rank = int(spec.parameters["rank"])
        return rank * (sum(spec.shape) - rank)

    @classmethod
    def encode(cls, left: Tensor, right: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of left (m, r) @ right (r, n), of full column and row rank r < m."""
        pivots, others, coefficients = pivot_rows(left)
        return cls.stored(torch.cat([pivots, others]), left[pivots] @ right, coefficients, bias)

    @classmethod
    def stored(cls, rows: Tensor, pivot: Tensor, rest: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of the weight whose rows `rows` (m,), in this order, are `pivot` (r, n) and rest @ pivot."""
        order = torch.empty_like(rows)
        order[rows] = torch.arange(len(rows), device=rows.device)
        stored = {"pivot.weight": pivot, "rest.weight": rest, "order": order.to(index_dtype(len(rows)))}
        if bias is not None:
            pivots, others = bias[rows].split([len(pivot), len(rest)])
            stored |= {"pivot.bias": pivots, "rest.bias": others - rest.to(bias.dtype) @ pivots}
        return stored

    def right_factor(self) -> nn.Linear | None:
        return self.pivot

    def check_indices(self) -> None:
        places = torch.arange(self.out_features, device=self.order.device)
        if not torch.equal(self.order.long().sort().values, places):
            raise self.refuse_index("order", f"a permutation of 0 to {self.out_features - 1}")

    def factor_pair(self) -> FactorPair:
        return FactorPair("rest.weight", "pivot.weight", pivoted=True)

    def dense(self) -> Tensor:
        rows = torch.cat([self.pivot.weight, self.rest.weight @ self.pivot.weight])
        return rows[self.order.long()]

    def factors(self) -> tuple[Tensor, Tensor]:
        """left (out, r) and right (r, in) whose product is the weight."""
        rows = torch.cat([torch.eye(self.pivot.out_features).to(self.rest.weight), self.rest.weight])
        return rows[self.order.long()], self.pivot.weight

    def dense_bias(self) -> Tensor | None:
        if self.pivot.bias is None:
            return None
        values = torch.cat([self.pivot.bias, self.rest.bias + self.rest.weight @ self.pivot.bias])
        return values[self.order.long()]

    def bias_tensors(self, bias: Tensor) -> dict[str, Tensor]:
        rows = torch.empty_like(bias)
        rows[self.order.long()] = bias
        pivots, others = rows.split([self.pivot.out_features, self.rest.out_features])
        return {"pivot.bias": pivots, "rest.bias": others - self.rest.weight.detach() @ pivots}

    def forward(self, x: Tensor) -> Tensor:
        pivoted = self.pivot(x)
        rest = self.rest(pivoted)
        return placed(pivoted, rest, self.order) if self._moves() else torch.cat([pivoted, rest], dim=-1)

    def _moves(self) -> bool:
        """Whether `order` puts anything elsewhere; kept until the buffer changes."""
        order = self.order
        if torch.compiler.is_compiling() or type(order) is not Tensor or order.is_meta or order.is_inference():
            return True
        version = (order._version, order.data_ptr())
        if self._checked is None or self._checked[0] is not order or self._checked[1] != version:
            places = torch.arange(len(order), dtype=order.dtype, device=order.device)
            self._checked = order, version, not torch.equal(order, places)
        return self._checked[2]

    def kernel(self, rows: int) -> str:
        return self.pivot.kernel(rows)

    def touched_bytes(self, rows: int) -> int:
        return held(*self.parameters()) + (held(self.order) if self._moves() else 0)
