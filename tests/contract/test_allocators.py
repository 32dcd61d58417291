"""One suite over every registered allocator."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.allocators import ALLOCATORS
from lrcompress.allocators.welore import normalise
from lrcompress.errors import InputError
from lrcompress.methods import make_method
from lrcompress.protocols import Curve, Site

ALL = ALLOCATORS.names()


def curves(seed: int, count: int = 6, format: str = "auto") -> list[Curve]:
    generator = torch.Generator().manual_seed(seed)
    method = make_method("welore", {}, format)
    made = []
    for i in range(count):
        shape = (
            int(torch.randint(20, 60, (), generator=generator)),
            int(torch.randint(20, 60, (), generator=generator)),
        )
        curve = method.curve(Site(f"w{i}", shape, i, f"w{i}", False), 2)
        values = torch.rand(min(shape), dtype=torch.float64, generator=generator).sort(descending=True).values * (i + 1)
        tail = torch.cat([(values**2).flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        curve.spectrum, curve.errors = values, tail[curve.ranks]
        made.append(curve)
    return made


def stored(found: list[Curve], levels: dict[str, int]) -> int:
    return sum(int(c.bytes[levels[c.name]]) for c in found)


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), ratio=st.floats(0.02, 0.9))
def test_never_above_the_budget_and_nothing_left_that_fits(name, seed, ratio):
    found = curves(seed)
    budget = int((1 - ratio) * sum(c.dense_bytes for c in found))
    levels = ALLOCATORS.get(name)().allocate(found, budget)
    assert set(levels) == {c.name for c in found}
    left = budget - stored(found, levels)
    assert left >= 0
    for curve in found:
        level = levels[curve.name]
        if level + 1 < len(curve.bytes):
            assert int(curve.bytes[level + 1] - curve.bytes[level]) > left


@pytest.mark.parametrize("name", ALL)
def test_more_bytes_never_lower_the_sum_of_ranks(name):
    found = curves(3)
    dense = sum(c.dense_bytes for c in found)
    ranks = []
    for kept in (0.3, 0.5, 0.7, 0.9):
        levels = ALLOCATORS.get(name)().allocate(found, int(kept * dense))
        ranks.append(sum(int(c.ranks[levels[c.name]]) for c in found))
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("name", ALL)
def test_an_impossible_budget_names_the_largest_ratio(name):
    with pytest.raises(InputError, match=r"at most 0\.9"):
        ALLOCATORS.get(name)().allocate(curves(1), 10)


def test_uniform_keeps_the_same_share_everywhere():
    found = curves(5)
    levels = ALLOCATORS.get("uniform")().allocate(found, int(0.6 * sum(c.dense_bytes for c in found)))
    for curve in found:
        step = float(curve.bytes.diff().max()) / curve.dense_bytes
        assert abs(float(curve.bytes[levels[curve.name]]) / curve.dense_bytes - 0.6) < 2 * step


def test_welore_is_one_threshold():
    """Whatever is kept is at least as large, normalised, as whatever is dropped, up to what the remainder bought."""
    found = curves(7, format="pivoted")
    levels = ALLOCATORS.get("welore")().allocate(found, int(0.5 * sum(c.dense_bytes for c in found)))
    kept, dropped = [], []
    for curve in found:
        rank, values = int(curve.ranks[levels[curve.name]]), normalise(curve)
        if 1 < rank < len(values) - 2:
            kept.append(float(values[rank - 1]))
            dropped.append(float(values[rank + 1]))
    assert min(kept) >= max(dropped) - 1e-9


def test_welore_on_equal_singular_values():
    curve = curves(1, 1)[0]
    curve.spectrum = torch.ones_like(curve.spectrum)
    assert normalise(curve).unique().tolist() == [1.0]
    assert ALLOCATORS.get("welore")().allocate([curve], int(0.5 * curve.dense_bytes))


def test_marginal_error_is_optimal_on_small_instances():
    """Against every combination of levels; the relaxation may lose at most what one step removes."""
    import itertools

    for seed in range(5):
        found = [thinned(curve, 7) for curve in curves(seed, 4)]
        dense = sum(c.dense_bytes for c in found)
        for kept in (0.4, 0.6, 0.8):
            budget = int(kept * dense)
            levels = ALLOCATORS.get("marginal_error")().allocate(found, budget)
            ours = sum(float(c.errors[levels[c.name]]) for c in found)
            best = min(
                sum(float(c.errors[i]) for c, i in zip(found, choice, strict=True))
                for choice in itertools.product(*(range(len(c.bytes)) for c in found))
                if sum(int(c.bytes[i]) for c, i in zip(found, choice, strict=True)) <= budget
            )
            largest_step = max(float(-c.errors.diff().min()) for c in found)
            assert best - 1e-9 <= ours <= best + largest_step


def thinned(curve: Curve, levels: int) -> Curve:
    index = torch.linspace(0, len(curve.bytes) - 1, levels).round().long().unique()
    return Curve(
        curve.name, curve.ranks[index], curve.bytes[index], curve.dense_bytes, curve.errors[index], curve.spectrum
    )


def test_marginal_error_skips_a_weight_that_costs_nothing():
    """A weight of rank one gets its rank and no more than the remainder."""
    found = curves(2, 3, format="low_rank")
    found[0].errors = torch.zeros_like(found[0].errors)
    levels = ALLOCATORS.get("marginal_error")().allocate(found, int(0.5 * sum(c.dense_bytes for c in found)))
    assert levels[found[0].name] <= 1


def test_the_lower_hull_is_convex_and_below_every_point():
    from lrcompress.allocators.marginal_error import lower_hull

    generator = torch.Generator().manual_seed(0)
    x = torch.arange(50).tolist()
    y = torch.rand(50, generator=generator).sort(descending=True).values.tolist()
    hull = lower_hull(x, y)
    assert hull[0] == 0
    assert hull[-1] == 49
    slopes = [(y[b] - y[a]) / (x[b] - x[a]) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    for a, b in itertools.pairwise(hull):
        for i in range(a, b + 1):
            assert y[i] >= y[a] + (y[b] - y[a]) * (i - a) / (b - a) - 1e-12
