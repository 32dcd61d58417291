"""WeLore's allocation: one threshold on all normalised singular values (arXiv 2407.11239)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lrcompress.allocators.base import ALLOCATORS, check_possible, spend
from lrcompress.protocols import Curve


@ALLOCATORS.register
class WeLore:
    """Keeps the singular values of W that, min-max-normalised per weight, reach one global threshold.

    The threshold is found by bisection on the stored bytes, which fall as it rises; the paper's table of
    thresholds for one model is not needed. What is left of the budget buys the next largest values.
    """

    name: ClassVar[str] = "welore"
    needs_errors: ClassVar[bool] = False
    needs_spectrum: ClassVar[bool] = True
    needs_sensitivity: ClassVar[bool] = False

    def allocate(self, curves: Sequence[Curve], budget: int) -> dict[str, int]:
        """Level per site; see protocols.Allocator."""
        check_possible(curves, budget)
        normalised = {c.name: normalise(c) for c in curves}

        def choose(threshold: float) -> dict[str, int]:
            levels = {}
            for curve in curves:
                rank = int((normalised[curve.name] >= threshold).sum())
                level = int(torch.searchsorted(curve.ranks, torch.tensor(rank)))
                levels[curve.name] = min(level, len(curve.ranks) - 1)
            return levels

        def stored(levels: dict[str, int]) -> int:
            return sum(int(c.bytes[levels[c.name]]) for c in curves)

        low, high = 0.0, 1.0 + 1e-9  # above 1 nothing is kept beyond the cheapest level
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if stored(choose(middle)) > budget else (low, middle)

        def next_value(curve: Curve, level: int) -> float:
            values = normalised[curve.name]
            return -float(values[min(int(curve.ranks[level]), len(values) - 1)])

        return spend(curves, choose(high), budget, next_value)


def normalise(curve: Curve) -> Tensor:
    """(k,) singular values mapped to [0, 1] by their own minimum and maximum; equal ones all count as 1."""
    if curve.spectrum is None:
        raise ValueError(f"the welore allocator needs the singular values of {curve.name}")
    values = curve.spectrum
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.ones_like(values)
