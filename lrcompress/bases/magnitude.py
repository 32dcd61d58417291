"""Magnitude pruning: the largest two of four."""

from typing import ClassVar

from torch import Tensor

from lrcompress.bases.base import BASES, SparseBase
from lrcompress.formats.semi_sparse import top_two


@BASES.register
class Magnitude(SparseBase):
    """Keeps the weights of largest size; needs no text."""

    name: ClassVar[str] = "magnitude"
    example: ClassVar[str] = "magnitude:2:4"
    paper: ClassVar[str] = "https://arxiv.org/abs/1506.02626"
    needs_gram: ClassVar[bool] = False

    def prune(self, weight: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
        return weight, top_two(weight.abs())
