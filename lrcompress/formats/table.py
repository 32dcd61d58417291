"""Table: the rows of input embeddings as integer codes, looked up by token, and multiplied by where a head is tied."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrcompress.formats.base import FORMATS, StoredLinear
from lrcompress.formats.coded import Coded, CodedWeight, Scales
from lrcompress.protocols import Spec


class Codes(CodedWeight):
    """The codes of a table, called by all that read them, so that whatever moves them about finds one module."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., in) of integers x (...); otherwise the product x Wᵀ (..., out) of x (..., in)."""
        return super().forward(x) if x.is_floating_point() else self.rows(x)


@FORMATS.register
class Table(StoredLinear):
    """W = row_scale ∘ codes ∘ column_scale, stored as `coded` under the name `table`.

    As it stands it multiplies, as every format does; `table_like` makes of it what looks rows up.
    """

    name: ClassVar[str] = "table"
    table: nn.Module

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.table = Codes(spec, dtype)

    @property
    def codes(self) -> Codes:
        """The module that holds the codes."""
        assert isinstance(self.table, Codes)
        return self.table

    @classmethod
    def check(cls, spec: Spec) -> None:
        Coded.check(spec)

    @staticmethod
    def encode(codes: Tensor, scales: Scales) -> dict[str, Tensor]:
        """Stored tensors of integer codes (out, in)."""
        stored = Coded.encode(codes, scales, None)
        return {"table.weight": torch.empty(0), **{f"table.{key}": tensor for key, tensor in stored.items()}}

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        return Coded.bytes(spec, element_size)

    def touched_bytes(self, rows: int) -> int:
        return self.codes.touched_bytes(rows)

    def kernel(self, rows: int) -> str:
        return self.codes.kernel(rows)

    def check_indices(self) -> None:
        self.codes.check_indices()

    def lay_out(self) -> None:
        self.codes.lay_out()

    def dense(self) -> Tensor:
        return self.codes.dense()

    def dense_bias(self) -> Tensor | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)  # type: ignore[no-any-return]


class TableEmbedding(Table, nn.Embedding):
    """A table in the place of nn.Embedding; in that of a subclass, one of both (`table_like`)."""

    def dense_embedding(self, weight: Tensor) -> nn.Embedding:
        """The module in whose place this one is, with `weight` (out, in)."""
        cls = nn.Embedding if type(self) is TableEmbedding else type(self).__bases__[0]
        made = _like(cls, self)
        made.weight = nn.Parameter(weight)
        return made

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def table_like(module: nn.Embedding, table: Table) -> TableEmbedding:
    """`table` in the place of `module`.

    A subclass keeps its attributes and buffers, and its forward, which is to get its rows from super().forward:
    what comes between it and nn.Embedding is the table.
    """
    kind = type(module)
    plain = kind is nn.Embedding
    made = _like(TableEmbedding if plain else type(f"Table{kind.__name__}", (kind, TableEmbedding), {}), module)
    made.spec, made.out_features, made.in_features = table.spec, table.out_features, table.in_features
    made.register_buffer("weight", table.weight)
    made.table = table.table
    return made


def _like(cls: type, module: nn.Module) -> Any:
    """One of `cls` with the attributes of `module` and its buffers, but for its weight and what a table has."""
    made: Any = object.__new__(cls)
    nn.Module.__init__(made)
    kept = vars(made).keys() | {"spec", "out_features", "in_features"}
    vars(made).update({key: value for key, value in vars(module).items() if key not in kept})
    made.training = module.training
    for name, buffer in module.named_buffers(recurse=False):
        if name != "weight":
            made.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    return made


class TiedHead(nn.Module):
    """An output head that multiplies by the codes of a table; nothing of it is stored.

    `weight` is empty and in no state dict: it is there for what ties both by name.
    """

    weight: Tensor

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._tied = (table,)  # no child: the table's tensors have one name
        self.out_features, self.in_features, self.bias = table.out_features, table.in_features, None
        self.register_buffer("weight", table.weight, persistent=False)

    @property
    def table(self) -> Table:
        """The table that is multiplied by."""
        return self._tied[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out)."""
        return self.table.table(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"
