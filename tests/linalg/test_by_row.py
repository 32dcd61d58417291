"""Rounding rows with metrics of their own, against each row's own metric and arithmetic entry by entry."""

import math

import pytest
import torch

from lrcompress.linalg.by_row import balanced_scales, round_by_row, row_metric
from lrcompress.linalg.rates import rates_by_row
from lrcompress.linalg.two_sided import expected_sizes, offsets
from tests.linalg.test_two_sided import gram


def parts(rows: int, columns: int, seed: int = 0):
    """Two Grams, and shares of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(2, rows, generator=generator, dtype=torch.float64).mul_(12).sub_(9).exp()
    return [(shares[0], gram(columns, 3 * columns, seed + 1)), (shares[1], 7 * gram(columns, 3 * columns, seed + 2))]


def test_a_group_of_every_row_has_exactly_the_rows_own_metric():
    first, second = parts(7, 12)
    metric = row_metric([first, second], 0.0, groups=7)
    for row in range(7):
        own = first[0][row] * first[1] + second[0][row] * second[1]
        factor, diagonal = metric.factor[metric.group[row]].double(), metric.diagonal[metric.group[row]]
        found = torch.empty_like(own)
        found[metric.by_column[:, None], metric.by_column] = metric.weight[row] * (factor * diagonal) @ factor.T
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6 * float(own.diagonal().mean()))


def test_few_groups_are_near_and_one_part_has_one_group():
    first, second = parts(400, 10)
    metric = row_metric([first, second], 0.0)
    assert torch.bincount(metric.group).tolist() == [50] * 8
    error = torch.randn(400, 10, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted = sum(shares * ((error @ matrix) * error).sum(1) for shares, matrix in (first, second))
    carried = torch.stack(
        [row[metric.by_column] @ metric.factor[g].double() for row, g in zip(error, metric.group, strict=True)]
    )
    found = metric.weight * (metric.diagonal[metric.group] * carried.square()).sum(1)
    assert float((found / wanted).log2().abs().max()) < 1
    assert float(found.sum()) == pytest.approx(float(wanted.sum()), rel=0.05)
    assert row_metric([first], 0.0).group.unique().tolist() == [0]


def test_with_balanced_scales_the_mean_weights_of_rows_and_columns_are_one():
    metric = row_metric(parts(60, 9), 0.01)
    rows, columns = balanced_scales(metric)
    weights = metric.weight[:, None] * metric.diagonal[metric.group] * torch.outer(rows, columns).square()
    torch.testing.assert_close(weights.mean(1), torch.ones(60, dtype=torch.float64))
    torch.testing.assert_close(weights.mean(0), torch.ones(9, dtype=torch.float64), rtol=1e-3, atol=0)
    one = row_metric(parts(60, 9)[:1], 0.01)
    rows, columns = balanced_scales(one)
    exact = one.weight[:, None] * one.diagonal[one.group] * torch.outer(rows, columns).square()
    torch.testing.assert_close(exact, torch.ones(60, 9, dtype=torch.float64))  # one group needs no compromise


@pytest.mark.parametrize("strip", [4, 64])
def test_every_entry_is_rounded_at_the_target_that_those_before_it_leave(strip):
    right = torch.eye(11).double() + 0.3 * torch.randn(11, 11).double().triu(1)
    target = 2 * torch.randn(6, 11, dtype=torch.float64)
    offset = offsets(expected_sizes(target))
    codes = round_by_row(target, right, offset, strip)
    error = torch.zeros_like(target)
    for i in range(6):
        for j in range(11):
            moved = float(target[i, j] - error[i, :j] @ right[:j, j])
            assert float(codes[i, j]) == math.copysign(math.floor(abs(moved) + float(offset[i, j])), moved)
            error[i, j] = codes[i, j] - target[i, j]


def test_predicted_bits_and_errors_are_those_of_rounding():
    generator = torch.Generator().manual_seed(4)
    right = torch.stack(
        [torch.eye(80).double() + (size / 80**0.5) * torch.randn(80, 80, generator=generator).double().triu(1)
         for size in (0.2, 1.2)]
    )  # fmt: skip
    uniform = torch.rand(400, 80, generator=generator).double() - 0.5
    target, group = -uniform.sign() * torch.log1p(-2 * uniform.abs()), torch.arange(400) % 2
    bits, steps, errors = rates_by_row(target, right, group)
    step = 0.5
    cut, squared, codes = offsets(expected_sizes(target / step)), 0.0, torch.empty_like(target)
    for index in range(2):
        own = group == index
        codes[own] = round_by_row(target[own] / step, right[index], cut[own])
        squared += float(((codes[own] * step - target[own]) @ right[index]).square().sum())
    shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    at = int((steps - math.log2(step)).abs().argmin())
    off = float(steps[at]) - math.log2(step)
    assert float(bits[at]) + off == pytest.approx(-float((shares * shares.log2()).sum()), rel=0.06, abs=0.05)
    assert float(errors[at]) / 4**off == pytest.approx(squared, rel=0.15)
