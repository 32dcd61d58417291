"""Ranks by energy against trying every choice."""

import itertools

import pytest
import torch

from lrcompress.linalg.ranks import ranks_for_error, ranks_within

ENERGIES = [torch.tensor(v, dtype=torch.float64) for v in ([9.0, 4.0, 1.0, 1e-30], [5.0, 4.5, 0.2], [0.3, 0.1])]


def every_choice(costs):
    for ranks in itertools.product(*(range(1, len(v) + 1) for v in ENERGIES)):
        lost = sum(float(v[r:].sum()) for v, r in zip(ENERGIES, ranks, strict=True))
        yield list(ranks), lost, sum(r * c for r, c in zip(ranks, costs, strict=True))


@pytest.mark.parametrize("budget", range(3, 10))
def test_at_one_cost_no_choice_loses_less(budget):
    found = ranks_within(ENERGIES, [1, 1, 1], budget)
    lost = sum(float(v[r:].sum()) for v, r in zip(ENERGIES, found, strict=True))
    assert sum(found) <= budget
    assert lost == pytest.approx(min(lost for _, lost, cost in every_choice([1, 1, 1]) if cost <= budget), abs=1e-20)


def test_noise_is_not_bought():
    assert ranks_within(ENERGIES, [1, 1, 1], 100) == [3, 3, 2]


@pytest.mark.parametrize("error", [0.1, 0.3, 0.5, 0.7])
def test_an_error_is_met_by_the_cheapest_choice_at_one_cost(error):
    found = ranks_for_error(ENERGIES, [2, 2, 2], error)
    total = sum(float(v.sum()) for v in ENERGIES)
    assert sum(float(v[r:].sum()) for v, r in zip(ENERGIES, found, strict=True)) <= error**2 * total
    assert 2 * sum(found) == min(cost for _, lost, cost in every_choice([2, 2, 2]) if lost <= error**2 * total)


def test_dear_components_wait():
    assert ranks_within(ENERGIES, [10, 1, 1], 13) == [1, 2, 1]
    assert ranks_within(ENERGIES, [10, 1, 1], 14) == [1, 3, 1]
    assert ranks_within(ENERGIES, [1, 10, 1], 14) == [3, 1, 1]
