"""GPTQ: rounding with compensation by the columns that follow (arXiv 2210.17323)."""

from typing import ClassVar

import torch
from torch import Tensor

from lrcompress.bases.base import BASES, GridBase
from lrcompress.bases.rtn import group_grids
from lrcompress.formats.quantized import Quantized
from lrcompress.linalg.compensation import gram_factor, sweep
from lrcompress.linalg.rounding import Grid, asymmetric_grid, best_grid

BLOCK = 64
"""About so many columns are compensated one by one: that costs as much a column as the block is wide."""


@BASES.register
class Gptq(GridBase):
    """Columns one after the other, each group's grid from the weights as updated when its first column is reached.

    With act_order the columns of the largest inputs come first; grids are then those of the original weights,
    so that groups stay neighbours and no index is stored.
    """

    name: ClassVar[str] = "gptq"
    example: ClassVar[str] = "gptq:3:64"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"
    needs_gram: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("act_order", "clip_search")

    def encode(self, weight: Tensor, gram: Tensor | None) -> dict[str, Tensor]:
        assert gram is not None
        (m, n), groups = weight.shape, -(-weight.shape[1] // self.group)
        block = self.group * max(1, BLOCK // self.group)
        if not self.options.act_order:
            scale, zero = weight.new_empty(2, groups, m).mT
            grids = Grid(scale, zero, self.bits)
            rounding = _Rounding(grids, list(range(n)), self.group, False, self.options.clip_search)
            sweep(weight, gram_factor(gram), block, rounding)
            return Quantized.encode(rounding.codes, grids.scale, grids.zero, self.bits, None)
        order = gram.diagonal().argsort(descending=True, stable=True)
        grids = group_grids(weight, self.bits, self.group, search=self.options.clip_search)
        rounding = _Rounding(grids, order.tolist(), self.group, True, self.options.clip_search)
        sweep(weight[:, order], gram_factor(gram[order][:, order]), block, rounding)
        codes = torch.empty_like(rounding.codes)
        codes[:, order] = rounding.codes
        return Quantized.encode(codes, grids.scale, grids.zero, self.bits, None)


class _Rounding:
    """Rounds one column to its group's grid; `fixed` grids are given, others made at a group's first column."""

    def __init__(self, grids: Grid, order: list[int], group: int, fixed: bool, search: bool) -> None:
        self.grids, self.order, self.group, self.fixed, self.search = grids, order, group, fixed, search
        self.codes = torch.empty(len(order), len(grids.scale), dtype=torch.uint8, device=grids.scale.device).T

    def __call__(self, weight: Tensor, column: int) -> Tensor:
        grids, index = self.grids, self.order[column] // self.group
        if not self.fixed and column % self.group == 0:
            values = weight[:, column : column + self.group]
            grid = (best_grid if self.search else asymmetric_grid)(values, grids.bits)
            grids.scale[:, index], grids.zero[:, index] = grid.scale[:, 0], grid.zero[:, 0]
        grid = Grid(grids.scale[:, index], grids.zero[:, index], grids.bits)
        codes = grid.codes(weight[:, column])
        self.codes[:, column] = codes
        return grid.numbers(codes)
