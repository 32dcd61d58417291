"""A search for the ratio that a loss allows takes few candidates, whatever the curve, and ends at the right one."""

import math

import pytest

from lrcompress.stages.next_ratio import Tried, next_ratio
from lrcompress.stages.search import MOST, _finished

CURVES = {
    "codes": lambda r: 4.0 ** -(16 * (1 - r)) * 90,  # a factor of four a bit
    "factors": lambda r: 3 * r**3,
    "a cliff": lambda r: 1e-4 if r < 0.4 else 50.0,
    "flat": lambda r: 1e-5,
    "always too much": lambda r: 5.0 + r,
    "gains at first": lambda r: math.exp(6 * (r - 0.7)) - 0.2,
}


def walk(loss, limit, predicted=None, nats=None, largest=0.95):
    """The candidates of a search whose losses (nats) are those of a function, as (ratio, nats)."""
    low, high, tried = 0.0, largest, []

    def rows():
        return [{"ratio": t.ratio, "loss": math.expm1(t.nats)} for t in tried]

    while not tried or not _finished(rows(), low, high, math.expm1(limit)):
        ratio = next_ratio(tried, low, high, limit, predicted, nats)
        assert low < ratio < high
        tried.append(Tried(ratio, loss(ratio)))
        low, high = (ratio, high) if tried[-1].nats <= limit else (low, ratio)
    return tried, low, high


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("limit", [0.02, 0.1])
def test_a_search_ends_near_the_largest_ratio_that_is_allowed(name, limit):
    loss = CURVES[name]
    tried, low, _ = walk(loss, limit)
    assert len(tried) <= MOST
    allowed = [t for t in tried if t.nats <= limit]
    if name == "always too much":
        assert not allowed
        return
    best = max(r / 1000 for r in range(950) if loss(r / 1000) <= limit)
    chosen = max(t.ratio for t in allowed)
    used = loss(chosen) >= 0.85 * limit
    assert used or (1 - chosen) / (1 - best) <= 1.08
    assert low == chosen


@pytest.mark.parametrize("off", [0.4, 1.0, 2.5])
def test_a_prediction_that_is_off_by_a_factor_is_enough_for_three_candidates(off):
    loss = CURVES["codes"]
    tried, *_ = walk(loss, 0.05, predicted=lambda r: 2 * off * loss(r), nats=0.5)
    assert len(tried) <= 3
    assert 0.9 * 0.05 <= max(t.nats for t in tried if t.nats <= 0.05)


def test_a_prediction_without_a_scale_gets_it_from_the_first_candidate():
    loss = CURVES["factors"]
    tried, *_ = walk(loss, 0.05, predicted=lambda r: 1234 * loss(r))
    assert tried[0].ratio == 0.475
    assert len(tried) <= 3


def test_candidates_beyond_all_numbers_leave_the_lower_half():
    assert next_ratio([Tried(0.5, None)], 0.0, 0.5, 0.1, None, None) == 0.25
    assert next_ratio([Tried(0.5, None)], 0.0, 0.5, 0.1, lambda r: r, None) == 0.25
