"""Round to nearest: every weight to the nearest number of its group's grid."""

from typing import ClassVar

from torch import Tensor, nn

from lrcompress.bases.base import BASES, GridBase
from lrcompress.formats.quantized import Quantized
from lrcompress.linalg.rounding import Grid, asymmetric_grid, best_grid


@BASES.register
class RoundToNearest(GridBase):
    """Asymmetric min-max grids per group; with clip_search the range of least error. Needs no text."""

    name: ClassVar[str] = "rtn"
    example: ClassVar[str] = "rtn:4:64"
    paper: ClassVar[str] = "https://arxiv.org/abs/2206.01861"
    needs_gram: ClassVar[bool] = False

    def encode(self, weight: Tensor, gram: Tensor | None) -> dict[str, Tensor]:
        grid = group_grids(weight, self.bits, self.group, search=self.options.clip_search)
        group = min(self.group, weight.shape[1])
        scale, zero = (t.repeat_interleave(group, 1)[:, : weight.shape[1]] for t in (grid.scale, grid.zero))
        spread = Grid(scale, zero, self.bits)
        return Quantized.encode(spread.codes(weight), grid.scale, grid.zero, self.bits, None)


def group_grids(weight: Tensor, bits: int, group: int, *, search: bool) -> Grid:
    """The grid of every group of `group` columns of weight (out, in); its scale and zero are (out, groups)."""
    group = min(group, weight.shape[1])
    # Zeros lie within every grid, so filling up the last group with them changes nothing.
    groups = nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    grid = best_grid(groups, bits) if search else asymmetric_grid(groups, bits)
    return Grid(grid.scale.squeeze(-1), grid.zero.squeeze(-1), bits)
