"""SparseGPT: pruning with compensation by the columns that follow (arXiv 2301.00774)."""

from typing import ClassVar

import torch
from torch import Tensor

from lrcompress.bases.base import BASES, SparseBase
from lrcompress.formats.semi_sparse import top_two
from lrcompress.kernels.rows import WIDTH
from lrcompress.linalg.compensation import gram_factor, sweep

BLOCK = 128


@BASES.register
class SparseGpt(SparseBase):
    """Of every four columns, as updated when they are reached, the two with the largest W² / diag(U)² stay."""

    name: ClassVar[str] = "sparsegpt"
    example: ClassVar[str] = "sparsegpt:2:4"
    paper: ClassVar[str] = "https://arxiv.org/abs/2301.00774"
    needs_gram: ClassVar[bool] = True

    def prune(self, weight: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
        assert gram is not None
        factor = gram_factor(gram)
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)

        def choose(updated: Tensor, column: int) -> Tensor:
            if column % WIDTH == 0:
                quad = slice(column, min(column + WIDTH, weight.shape[1]))
                mask[:, quad] = top_two((updated[:, quad] * factor.diagonal()[quad]).abs())
            return updated[:, column] * mask[:, column]

        return sweep(weight, factor, BLOCK, choose), mask
