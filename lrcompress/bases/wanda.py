"""Wanda: the weights of largest size times their input's norm (arXiv 2306.11695)."""

from typing import ClassVar

from torch import Tensor

from lrcompress.bases.base import BASES, SparseBase
from lrcompress.formats.semi_sparse import top_two


@BASES.register
class Wanda(SparseBase):
    """Keeps the largest |W| sqrt(diag G) of every four, as they are."""

    name: ClassVar[str] = "wanda"
    example: ClassVar[str] = "wanda:2:4"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"
    needs_gram: ClassVar[bool] = True

    def prune(self, weight: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
        assert gram is not None
        return weight, top_two(weight.abs() * gram.diagonal().clamp_min(0).sqrt())
