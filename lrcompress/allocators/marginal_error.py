"""Marginal error: bytes go where they lower the squared error most, one price per byte for all weights."""

import heapq
import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch

from lrcompress.allocators.base import ALLOCATORS, check_possible
from lrcompress.protocols import Curve


@ALLOCATORS.register
class MarginalError:
    """One Lagrange multiplier on squared error per stored byte, over the lower convex hull of every curve.

    Steps along the hulls are taken from the steepest to the flattest while they fit; that is the least sum of errors
    for the bytes they use. What is left buys, again and again, the best affordable step, off the hulls too.
    """

    name: ClassVar[str] = "marginal_error"
    needs_errors: ClassVar[bool] = True
    needs_spectrum: ClassVar[bool] = False
    needs_sensitivity: ClassVar[bool] = False

    def allocate(self, curves: Sequence[Curve], budget: int) -> dict[str, int]:
        """Level per site; see protocols.Allocator."""
        check_possible(curves, budget)
        levels = [0] * len(curves)
        left = budget - sum(int(c.bytes[0]) for c in curves)
        steps = sorted((-gain, i, end, cost) for i, c in enumerate(curves) for gain, end, cost in hull_steps(c))
        for _, i, end, cost in steps:
            if cost > left:
                break
            levels[i], left = end, left - cost
        _spend(curves, levels, left)
        return {curve.name: level for curve, level in zip(curves, levels, strict=True)}


def hull_steps(curve: Curve) -> list[tuple[float, int, int]]:
    """(error removed per byte, level reached, bytes) of each edge of the lower convex hull, steepest first."""
    if curve.errors is None:
        raise ValueError(f"the marginal_error allocator needs the errors of {curve.name}")
    errors, costs = curve.errors.tolist(), curve.bytes.tolist()
    steps: list[tuple[float, int, int]] = []
    corners = [0]
    for level in range(1, len(costs)):
        while len(corners) > 1 and _slope(errors, costs, corners[-2], corners[-1]) >= _slope(
            errors, costs, corners[-1], level
        ):
            corners.pop()
        corners.append(level)
    for start, end in itertools.pairwise(corners):
        gain = -_slope(errors, costs, start, end)
        if gain > 0:
            steps.append((gain, end, costs[end] - costs[start]))
    return steps


def _slope(errors: list[float], costs: list[int], start: int, end: int) -> float:
    return (errors[end] - errors[start]) / (costs[end] - costs[start])


def _spend(curves: Sequence[Curve], levels: list[int], left: int) -> None:
    """Raise `levels` by the affordable step of the largest gain per byte until none that does no harm fits."""
    queue: list[tuple[float, int, int]] = []

    def offer(i: int) -> None:
        best = _best_step(curves[i], levels[i], left)
        if best is not None:
            heapq.heappush(queue, (-best[0], i, best[1]))

    for i in range(len(curves)):
        offer(i)
    while queue:
        _, i, level = heapq.heappop(queue)
        cost = int(curves[i].bytes[level] - curves[i].bytes[levels[i]])
        if cost <= left:
            levels[i], left = level, left - cost
        offer(i)


def _best_step(curve: Curve, level: int, left: int) -> tuple[float, int] | None:
    """The largest error removed per byte, and the level that it leads to, within `left` bytes."""
    assert curve.errors is not None
    costs = curve.bytes[level + 1 :] - curve.bytes[level]
    fitting = int((costs <= left).sum())
    if not fitting:
        return None
    gains = (curve.errors[level] - curve.errors[level + 1 : level + 1 + fitting]) / costs[:fitting]
    best = int(torch.argmax(gains))
    return (float(gains[best]), level + 1 + best) if gains[best] >= 0 else None
