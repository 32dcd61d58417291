"""The same ratio for every weight."""

from collections.abc import Sequence
from typing import ClassVar

from lrcompress.allocators.base import ALLOCATORS, check_possible, level_within, spend
from lrcompress.protocols import Curve


@ALLOCATORS.register
class Uniform:
    """Every weight keeps the same fraction of its bytes; what rounding leaves goes to those furthest below it."""

    name: ClassVar[str] = "uniform"
    needs_errors: ClassVar[bool] = False
    needs_spectrum: ClassVar[bool] = False
    needs_sensitivity: ClassVar[bool] = False

    def allocate(self, curves: Sequence[Curve], budget: int) -> dict[str, int]:
        """Level per site; see protocols.Allocator."""
        check_possible(curves, budget)
        share = budget / sum(c.dense_bytes for c in curves)
        levels = {c.name: level_within(c, share * c.dense_bytes) for c in curves}
        over = sum(int(c.bytes[levels[c.name]]) for c in curves) > budget
        if over:  # some site's cheapest level is above its share: begin from the bottom and fill evenly
            levels = {c.name: 0 for c in curves}
        return spend(curves, levels, budget, lambda c, level: float(c.bytes[level]) / c.dense_bytes)
