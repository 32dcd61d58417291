"""Bytes where they lower the error most: one Lagrange multiplier over all weights."""

import itertools
from collections.abc import Sequence
from typing import ClassVar

from lrcompress.allocators.base import ALLOCATORS, check_possible, spend
from lrcompress.protocols import Curve


@ALLOCATORS.register
class MarginalError:
    """Minimises the sum of squared errors within the budget, keeping a weight dense where that is cheaper.

    Every curve is reduced to its lower convex hull; the hulls' steps are taken in the order of error removed per byte,
    which is the optimum of the relaxed problem for every budget that a step ends at. What is left of the budget buys
    the best single levels. The errors must be comparable across weights, as those of the trace and two_sided metrics.
    """

    name: ClassVar[str] = "marginal_error"
    needs_errors: ClassVar[bool] = True
    needs_spectrum: ClassVar[bool] = False

    def allocate(self, curves: Sequence[Curve], budget: int) -> dict[str, int]:
        """Level per site; see protocols.Allocator."""
        check_possible(curves, budget)
        levels = {curve.name: 0 for curve in curves}
        left = budget - sum(int(curve.bytes[0]) for curve in curves)
        steps = []
        for order, curve in enumerate(curves):
            hull = lower_hull(_bytes(curve), _errors(curve))
            steps += [(-gain, order, level, cost) for gain, level, cost in _steps(curve, hull)]
        blocked: set[int] = set()
        for _, order, level, cost in sorted(steps):
            if order in blocked or cost > left:
                blocked.add(order)  # a later step of this curve begins where this one would have ended
                continue
            levels[curves[order].name], left = level, left - cost
        return spend(curves, levels, budget, _urgency)


def lower_hull(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of the points (x ascending, y descending), from the first to the last."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _bytes(curve: Curve) -> list[int]:
    return [int(value) for value in curve.bytes.tolist()]


def _errors(curve: Curve) -> list[float]:
    if curve.errors is None:
        raise ValueError(f"the marginal_error allocator needs the errors of {curve.name}")
    return [float(value) for value in curve.errors.tolist()]


def _steps(curve: Curve, hull: list[int]) -> list[tuple[float, int, int]]:
    """(error removed per byte, level reached, bytes) of every edge of a hull."""
    cost, error = _bytes(curve), _errors(curve)
    steps: list[tuple[float, int, int]] = []
    for a, b in itertools.pairwise(hull):
        gain = (error[a] - error[b]) / (cost[b] - cost[a])
        # Rounding must not let a later edge sort before an earlier one.
        steps.append((min([gain, *(g for g, _, _ in steps[-1:])]), b, cost[b] - cost[a]))
    return steps


def _urgency(curve: Curve, level: int) -> float:
    """Minus the error that the next level removes per byte."""
    if curve.errors is None or level + 1 >= len(curve.bytes):
        return 0.0
    gain = float(curve.errors[level] - curve.errors[level + 1])
    return -gain / float(curve.bytes[level + 1] - curve.bytes[level])
