"""The registry of allocators and what they share."""

import heapq
import math
from collections.abc import Callable, Sequence

from lrcompress.errors import InputError
from lrcompress.protocols import Allocator, Curve
from lrcompress.registry import Registry

ALLOCATORS: Registry[type[Allocator]] = Registry("allocator", "lrcompress.allocators")


def check_possible(curves: Sequence[Curve], budget: int, of: str = "bytes") -> None:
    """InputError where even the cheapest level of every site is above the budget; it names the largest ratio.

    `of` is what a curve's costs count.
    """
    least = sum(int(c.bytes[0]) for c in curves)
    if least > budget:
        dense = sum(c.dense_bytes for c in curves)
        raise InputError(
            f"the asked ratio leaves {budget} {of}, the smallest choice needs {least}: "
            f"ask for a ratio of at most {largest_ratio(least, dense):.4f}"
        )


def largest_ratio(least: int, dense: int) -> float:
    """The ratio that leaves `least` of `dense` bytes, rounded down to four places so that it can be asked for."""
    return math.floor((1 - least / dense) * 1e4) / 1e4


def level_within(curve: Curve, limit: float) -> int:
    """The highest level that stores at most `limit` bytes, 0 where none does."""
    return max(0, int((curve.bytes <= limit).sum()) - 1)


def spend(
    curves: Sequence[Curve], levels: dict[str, int], budget: int, urgency: Callable[[Curve, int], float]
) -> dict[str, int]:
    """Raise levels one at a time while they fit, always the site with the smallest `urgency(curve, level)`.

    A site whose next level no longer fits is left where it is.
    """
    levels = dict(levels)
    left = budget - sum(int(c.bytes[levels[c.name]]) for c in curves)
    queue = [(urgency(c, levels[c.name]), i) for i, c in enumerate(curves)]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        curve = curves[i]
        level = levels[curve.name]
        if level + 1 >= len(curve.bytes):
            continue
        step = int(curve.bytes[level + 1] - curve.bytes[level])
        if step <= left:
            levels[curve.name], left = level + 1, left - step
            heapq.heappush(queue, (urgency(curve, level + 1), i))
    return levels
