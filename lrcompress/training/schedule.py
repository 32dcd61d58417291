"""How far a training is, when it is measured, and the learning rate that follows from it."""

import math
from dataclasses import dataclass, field

WARM_UP, LAST_RATE = 0.05, 0.1
"""Share of the budget that the rate rises in; what is left of it at the end of its half cosine."""

EVALUATIONS, EARLY = 8, 0.25
"""Evaluations over the budget, twice as often in its first part."""

PATIENCE = 4
"""Training ends after so many evaluations in a row without a better one."""

NOISE = 0.005
"""Nats that two losses on the held-out rows differ by for nothing: of two such states the later one has read more."""

SLOWER, BACK = 0.5, 0.25
"""What is left of the learning rate after an evaluation that is no better, and after one that has lost half of what was
gained, from which training goes back to the best state."""


@dataclass
class Progress:
    """What a run has done; saved with every checkpoint and read again when it is resumed."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rate: float = 1.0
    """What is left of the learning rate after the times that it was too high."""
    before: float = math.nan
    best: float = math.nan
    best_step: int = 0
    waiting: int = 0
    """Evaluations since the best one."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Finite ones."""


def evaluations_at(fraction: float) -> int:
    """How many there are when `fraction` of the budget is spent."""
    return math.floor(EVALUATIONS * (fraction + min(fraction, EARLY)))


def rate_at(fraction: float) -> float:
    """Factor of the learning rate when `fraction` of the budget is spent: a short rise, then half a cosine."""
    if fraction < WARM_UP:
        return LAST_RATE + (1 - LAST_RATE) * fraction / WARM_UP
    done = min(1.0, (fraction - WARM_UP) / (1 - WARM_UP))
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
