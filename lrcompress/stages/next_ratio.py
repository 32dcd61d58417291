"""Which ratio a search for a loss tries next, from what was measured and what is predicted."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

AIM, AFTER_ABOVE, AFTER_WITHIN = 0.95, 0.8, 1.05
"""Of the loss that is allowed, what the next candidate is meant to have: usually, and where the last two candidates
were above it, or within."""

EDGE = 0.1
"""Of the ratios that are left, those next to either end that are not tried."""

HALVINGS = 12

Predicted = Callable[[float], float]
"""The squared error that a ratio costs, in any unit, growing with it."""


Point = tuple[float, float]
"""A ratio, and the logarithm of the nats a token that the loss rose by there."""


@dataclass(frozen=True)
class Tried:
    """A measured ratio: nats a token that the loss rose by there; None where it was beyond all numbers."""

    ratio: float
    nats: float | None


def next_ratio(
    tried: Sequence[Tried], low: float, high: float, limit: float, predicted: Predicted | None, nats: float | None
) -> float:
    """Between `low`, which is within the limit (nats a token), and `high`, which is not or is as far as a method goes.

    The loss is taken to be a factor times what is predicted: that of the measured ratio nearest to the limit, at first
    `nats`, where a unit of what is predicted is so many. Without a prediction the logarithm of the loss is
    interpolated. The middle is next where nothing is known, or where the last three candidates were on the same side.
    """
    middle = (low + high) / 2
    measured = [(t.ratio, math.log(t.nats)) for t in tried if t.nats is not None and t.nats > 0]
    within = [t.nats is not None and t.nats <= limit for t in tried]
    if within[-3:] in ([True] * 3, [False] * 3):
        return middle
    last = within[-2:]
    aim = AFTER_WITHIN if last == [True, True] else AFTER_ABOVE if last == [False, False] else AIM
    target = math.log(aim * limit)
    found = None
    if predicted is not None and (measured or (nats is not None and not tried)):
        found = _by_prediction(measured, low, high, target, predicted, nats)
    elif len(measured) > 1:
        found = _by_interpolation(measured, target)
    if found is None:
        return middle
    margin = EDGE * (high - low)
    return min(max(found, low + margin), high - margin)


def _by_prediction(
    measured: Sequence[Point], low: float, high: float, target: float, predicted: Predicted, nats: float | None
) -> float | None:
    """The ratio whose prediction, times the factor that was measured, is the target; None without such a factor."""
    factor = nats or 0.0
    if measured:
        ratio, height = min(measured, key=lambda point: abs(point[1] - target))
        there = predicted(ratio)
        factor = math.exp(height) / there if there > 0 else 0.0
    if not 0 < factor < math.inf:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if factor * predicted(middle) <= math.exp(target) else (low, middle)
    return (low + high) / 2


def _by_interpolation(measured: Sequence[Point], target: float) -> float | None:
    """Where the line through the two measurements nearest to the target meets it; None where it does not rise."""
    (x, y), (other, height) = sorted(measured, key=lambda point: abs(point[1] - target))[:2]
    if (height - y) * (other - x) <= 0:
        return None
    return x + (other - x) * (target - y) / (height - y)
