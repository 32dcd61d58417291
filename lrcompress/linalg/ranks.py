"""How many components of which matrix, by their energies: each list (k,) is descending and of one cost a component."""

from collections.abc import Sequence

import torch
from torch import Tensor

NOISE = 1e-28
"""Components of less than this share of a matrix's largest energy are rounding of a float64 decomposition."""


def ranks_within(energies: Sequence[Tensor], costs: Sequence[int], budget: int, least: int = 1) -> list[int]:
    """Ranks of at least `least` that keep the most energy for `budget`, the dearest of a cost first (greedy).

    Every component is bought where it still fits, in the order of energy per cost; noise is never bought.
    """
    ranks = [min(least, len(values)) for values in energies]
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    for which in _order(energies, costs, ranks):
        if costs[which] <= left:
            ranks[which] += 1
            left -= costs[which]
    return ranks


def ranks_for_error(energies: Sequence[Tensor], costs: Sequence[int], error: float, least: int = 1) -> list[int]:
    """The cheapest ranks of at least `least`, so found, that leave out at most error² of the energy of all together."""
    ranks = [min(least, len(values)) for values in energies]
    total = sum(float(values.sum()) for values in energies)
    left = sum(float(values[rank:].sum()) for values, rank in zip(energies, ranks, strict=True))
    for which in _order(energies, costs, ranks):
        if left <= error**2 * total:
            break
        left -= float(energies[which][ranks[which]])
        ranks[which] += 1
    return ranks


def _order(energies: Sequence[Tensor], costs: Sequence[int], first: Sequence[int]) -> list[int]:
    """The matrix of every component from `first` on, largest energy per cost first."""
    gains, owners = [], []
    for i, (values, cost, start) in enumerate(zip(energies, costs, first, strict=True)):
        real = values[start:][values[start:] > NOISE * values[:1].sum()]
        gains.append(real.double() / cost)
        owners.append(torch.full((len(real),), i))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    return torch.cat(owners)[order].tolist()  # type: ignore[no-any-return]
