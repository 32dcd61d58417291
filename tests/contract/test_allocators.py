"""One suite over every registered allocator."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.allocators import ALLOCATORS
from lrcompress.allocators.marginal_error import hull_steps
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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(5))
def test_the_named_ratio_is_possible(name, seed):
    found = curves(seed)
    dense = sum(c.dense_bytes for c in found)
    with pytest.raises(InputError) as refused:
        ALLOCATORS.get(name)().allocate(found, 10)
    ratio = float(str(refused.value).rsplit(" ", 1)[1])
    assert ALLOCATORS.get(name)().allocate(found, int((1 - ratio) * dense))


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


def small(seed: int, convex: bool) -> list[Curve]:
    """Three curves of five levels with random steps, convex or not."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(3):
        costs = torch.randint(1, 9, (5,), generator=generator).cumsum(0)
        gains = torch.rand(4, dtype=torch.float64, generator=generator)
        if convex:
            gains = gains.sort(descending=True).values * costs.diff()
        errors = torch.cat([gains.flip(0).cumsum(0).flip(0), gains.new_zeros(1)])
        made.append(Curve(f"w{i}", torch.tensor([1, 2, 3, 4, 9]), costs, int(costs[-1]), errors))
    return made


@pytest.mark.parametrize("convex", [True, False])
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_marginal_error_against_every_choice(convex, seed, share):
    """Never further from the best of all choices than one step of a hull, the bound of the Lagrangian solution."""
    found = small(seed, convex)
    least, most = sum(int(c.bytes[0]) for c in found), sum(int(c.bytes[-1]) for c in found)
    budget = int(least + share * (most - least))
    levels = ALLOCATORS.get("marginal_error")().allocate(found, budget)
    assert stored(found, levels) <= budget
    reached = sum(float(c.errors[levels[c.name]]) for c in found)
    best = min(
        sum(float(c.errors[i]) for c, i in zip(found, choice, strict=True))
        for choice in itertools.product(range(5), repeat=3)
        if sum(int(c.bytes[i]) for c, i in zip(found, choice, strict=True)) <= budget
    )
    step = max(gain * cost for c in found for gain, _, cost in hull_steps(c))
    assert reached <= best + step


@pytest.mark.parametrize("seed", range(30))
def test_marginal_error_is_the_best_choice_at_a_price(seed):
    """Where the budget is what one price per byte buys, nothing cheaper is as good."""
    found = small(seed, convex=False)
    steps = sorted((-gain, i, cost) for i, c in enumerate(found) for gain, _, cost in hull_steps(c))
    budget = sum(int(c.bytes[0]) for c in found) + sum(cost for _, _, cost in steps[: len(steps) // 2])
    levels = ALLOCATORS.get("marginal_error")().allocate(found, budget)
    reached = sum(float(c.errors[levels[c.name]]) for c in found)
    for choice in itertools.product(range(5), repeat=3):
        if sum(int(c.bytes[i]) for c, i in zip(found, choice, strict=True)) <= budget:
            assert reached <= sum(float(c.errors[i]) for c, i in zip(found, choice, strict=True)) + 1e-12


def test_marginal_error_buys_nothing_that_does_harm():
    """Errors may rise with a level where factors have few bits."""
    curve = Curve("w", torch.tensor([0, 1, 9]), torch.tensor([1, 2, 10]), 10, torch.tensor([1.0, 1.5, 0.0]).double())
    assert ALLOCATORS.get("marginal_error")().allocate([curve], 9) == {"w": 0}
    assert ALLOCATORS.get("marginal_error")().allocate([curve], 10) == {"w": 2}


def test_marginal_error_needs_errors():
    with pytest.raises(ValueError, match="needs the errors of w"):
        hull_steps(Curve("w", torch.tensor([1, 2]), torch.tensor([1, 2]), 2))
