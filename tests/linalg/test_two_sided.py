"""Rounding with feedback to both sides, against the loss itself and entry-by-entry arithmetic."""

import math

import pytest
import torch

from lrcompress.linalg import damped
from lrcompress.linalg.rates import rates_of
from lrcompress.linalg.two_sided import Tiles, expected_sizes, in_steps, offsets, round_two_sided, unit_factor


def gram(size: int, rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, size, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, size)
    mixed = mixed @ (torch.eye(size) + 0.3 * torch.randn(size, size, generator=generator)).double()
    return mixed.T @ mixed / rows


def problem(m: int, n: int, seed: int = 0):
    """A weight in steps, both Grams and their unit factors."""
    inputs, outputs = gram(n, 3 * n, seed), gram(m, 3 * m, seed + 1)
    weight = 2 * torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    factors = [part.double() for gram in (outputs, inputs) for part in unit_factor(gram, 1e-9)]
    return weight, *factors, outputs, inputs


def tiles_of(size: int) -> type[Tiles]:
    return type("Small", (Tiles,), {"size": size})


@pytest.mark.parametrize("order", [None, torch.randperm(23, generator=torch.Generator().manual_seed(6))])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_unit_factor_gives_the_damped_gram(damping, order, monkeypatch):
    monkeypatch.setattr(damped, "STRIP", 10)
    matrix = gram(23, 60, 5)
    factor, diagonal = unit_factor(matrix, damping, order)
    matrix = matrix if order is None else matrix[order][:, order]
    assert torch.equal(factor, factor.triu())
    assert torch.equal(factor.diagonal(), torch.ones(23, dtype=factor.dtype))
    factor, diagonal = factor.double(), diagonal.double()
    wanted = matrix + damping * matrix.diagonal().mean() * torch.eye(23, dtype=torch.float64)
    torch.testing.assert_close(factor @ torch.diag(diagonal) @ factor.T, wanted, rtol=1e-6, atol=1e-6)


def test_a_factor_is_float32_where_that_is_small_beside_the_damping_and_float64_where_it_is_not():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    rows[:, 7] *= 3000  # as a massive activation
    matrix = rows.T @ rows / 40
    for damping, dtype in ((0.01, torch.float32), (1e-9, torch.float64)):
        factor, diagonal = unit_factor(matrix, damping)
        assert factor.dtype == diagonal.dtype == dtype
        mean = matrix.diagonal().mean()
        wanted = matrix + max(damping, torch.finfo(torch.float32).eps) * mean * torch.eye(60, dtype=torch.float64)
        missed = factor.double() @ torch.diag(diagonal.double()) @ factor.double().T - wanted
        assert float(torch.linalg.eigvalsh(missed).square().mean().sqrt()) < 0.02 * damping * mean + 1e-9 * mean


def test_singular_and_empty_grams_have_factors_and_broken_ones_are_refused():
    row = torch.randn(1, 9, dtype=torch.float64)
    factor, diagonal = unit_factor(row.T @ row, 0.0)
    assert bool(torch.isfinite(factor).all())
    assert bool((diagonal > 0).all())
    factor, diagonal = unit_factor(torch.zeros(4, 4, dtype=torch.float64), 0.0)
    torch.testing.assert_close(factor, torch.eye(4, dtype=factor.dtype))
    with pytest.raises(ArithmeticError, match="non-finite"):
        unit_factor(torch.full((3, 3), torch.nan, dtype=torch.float64), 0.1)
    with pytest.raises(ArithmeticError, match="not positive"):
        unit_factor(torch.diag(torch.tensor([1.0, -9.0])).double(), 0.1)


@pytest.mark.parametrize(("m", "n", "tile"), [(9, 14, 4), (14, 9, 4), (8, 8, 8), (1, 7, 4), (7, 1, 4), (13, 5, 64)])
def test_every_entry_is_rounded_at_the_target_that_those_before_it_leave(m, n, tile):
    """Against the definition: T = Nᵀ E M with all earlier entries rounded, its own error left out."""
    weight, left, _, right, _, _, _ = problem(m, n)
    offset = offsets(expected_sizes(weight))
    codes = round_two_sided(weight, left, right, offset, tiles_of(tile))
    error, expected = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in range(m):
        for j in range(n):
            target = float(weight[i, j] - (left.T @ error @ right)[i, j])
            expected[i, j] = math.copysign(math.floor(abs(target) + float(offset[i, j])), target)
            error[i, j] = expected[i, j] - weight[i, j]
    assert torch.equal(codes, expected)


def test_the_loss_is_the_weighed_sum_of_what_rounding_leaves_and_below_that_of_one_side():
    weight, left, row, right, column, outputs, inputs = problem(40, 56)
    row, column = row.double(), column.double()
    rows, columns = row.rsqrt(), column.rsqrt()
    steps = torch.outer(rows, columns) * (0.5 / float(rows.mean() * columns.mean()))
    half, losses = torch.full_like(weight, 0.5, dtype=torch.float32), []
    for n_factor in (left, torch.eye(40).double()):
        for m_factor in (right, torch.eye(56).double()):
            factors = in_steps(n_factor, rows), in_steps(m_factor, columns)
            codes = round_two_sided((weight / steps).float(), *factors, half, tiles_of(16))
            error = codes * steps - weight
            losses.append(float((outputs @ error * (error @ inputs)).sum()))
            carried = left.T @ error @ right
            assert losses[-1] == pytest.approx(
                float((torch.outer(row, column) * carried.square()).sum()), rel=1e-3
            )  # the factors' own damping
    both, of_outputs, of_inputs, none = losses
    assert both < min(of_outputs, of_inputs) < none


def test_a_dearer_code_is_decided_later_and_never_beyond_the_largest_shift():
    offset = offsets(torch.tensor([1e-12, 0.1, 1.0, 100.0]))
    assert bool((offset.diff() >= 0).all())
    assert float(offset[0]) == pytest.approx(0.35)
    assert float(offset[-1]) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("step", [0.4, 1.0, 3.0])
def test_predicted_bits_and_errors_are_those_of_rounding(step):
    """Of Laplacian entries and factors of a weak correlation, as those of real layers are."""
    generator = torch.Generator().manual_seed(4)
    left, right = (
        torch.eye(size).double() + (0.6 / size**0.5) * torch.randn(size, size, generator=generator).double().triu(1)
        for size in (96, 160)
    )
    uniform = torch.rand(96, 160, generator=generator).double() - 0.5
    target = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    bits, steps, errors = rates_of(target, left, right)
    assert bool((bits.diff() < 0).all())
    codes = round_two_sided(target / step, left, right, offsets(expected_sizes(target / step)))
    shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    entropy = -float((shares * shares.log2()).sum())
    carried = left.T @ (codes * step - target) @ right
    at = int((steps - math.log2(step)).abs().argmin())
    off = float(steps[at]) - math.log2(step)
    assert float(bits[at]) + off == pytest.approx(entropy, rel=0.06, abs=0.05)
    assert float(errors[at]) / 4**off == pytest.approx(float(carried.square().sum()), rel=0.15)
