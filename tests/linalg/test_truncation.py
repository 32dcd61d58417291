"""Truncation against dense reference decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress.linalg.truncation import decompose, leading, product_energy, randomised, retruncate, singular_values


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(seed: int, n: int, rows: int) -> torch.Tensor:
    x = random(seed, rows, n) * torch.logspace(0, -3, n, dtype=torch.float64)
    return x.T @ x / rows


def truncated(spectrum, rank: int) -> torch.Tensor:
    return spectrum.left[:, :rank] @ spectrum.right[:rank]


shapes = pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])


@shapes
def test_plain_equals_the_svd(shape):
    weight = random(0, *shape)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    spectrum = decompose(weight)
    for rank in (1, 7, 23):
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
        torch.testing.assert_close(truncated(spectrum, rank), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spectrum.energies, s**2, rtol=1e-9, atol=1e-9)


@shapes
def test_input_metric_equals_cholesky_whitening(shape):
    weight, second = random(1, *shape), gram(2, shape[1], 200)
    factor = torch.linalg.cholesky(second)
    u, s, vt = torch.linalg.svd(weight @ factor, full_matrices=False)
    spectrum = decompose(weight, second)
    for rank in (1, 9, 20):
        expected = torch.linalg.solve(factor, (u[:, :rank] * s[:rank]) @ vt[:rank], left=False)
        torch.testing.assert_close(truncated(spectrum, rank), expected, rtol=1e-6, atol=1e-8)


@shapes
def test_two_sided_metric_equals_double_whitening(shape):
    weight, inputs, outputs = random(1, *shape), gram(2, shape[1], 200), gram(3, shape[0], 200)
    a, b = torch.linalg.cholesky(inputs), torch.linalg.cholesky(outputs)
    u, s, vt = torch.linalg.svd(b.T @ weight @ a, full_matrices=False)
    spectrum = decompose(weight, inputs, outputs)
    torch.testing.assert_close(spectrum.energies, s**2, rtol=1e-6, atol=1e-10)
    for rank in (2, 11):
        inner = (u[:, :rank] * s[:rank]) @ vt[:rank]
        expected = torch.linalg.solve(a, torch.linalg.solve(b.T, inner), left=False)
        torch.testing.assert_close(truncated(spectrum, rank), expected, rtol=1e-5, atol=1e-7)


@shapes
def test_no_other_matrix_of_the_rank_is_nearer(shape):
    weight, second = random(4, *shape), gram(5, shape[1], 100)
    spectrum = decompose(weight, second)
    best = error(weight - truncated(spectrum, 6), second)
    torch.testing.assert_close(best, spectrum.errors()[6].item(), rtol=1e-8, atol=1e-10)
    for seed in range(5):
        nearby = truncated(spectrum, 6) + 1e-2 * random(seed, shape[0], 6) @ random(seed + 9, 6, shape[1])
        u, s, vt = torch.linalg.svd(nearby)
        nearby = (u[:, :6] * s[:6]) @ vt[:6]
        assert error(weight - nearby, second) > best


@pytest.mark.parametrize("outputs", [None, 3])
def test_the_outputs_moment_of_a_wide_weight_says_as_much_as_the_inputs(outputs):
    weight, inputs = random(1, 24, 40), gram(2, 40, 200)
    metric = None if outputs is None else gram(outputs, 24, 200)
    ours = decompose(weight, None, metric, output_moment=weight @ inputs @ weight.T)
    plain = decompose(weight, inputs, metric)
    torch.testing.assert_close(ours.energies, plain.energies, rtol=1e-9, atol=1e-12)
    for rank in (3, 20):
        torch.testing.assert_close(truncated(ours, rank), truncated(plain, rank), rtol=1e-6, atol=1e-8)


def error(difference: torch.Tensor, second: torch.Tensor) -> float:
    return float((difference @ second * difference).sum())


@shapes
@pytest.mark.parametrize("rows", [1, 5, 10])
def test_fewer_tokens_than_features(shape, rows):
    """A singular Gram: where the data has rank `rows`, that rank loses nothing on the data."""
    x = random(6, rows, shape[1])
    weight = random(7, *shape)
    spectrum = decompose(weight, x.T @ x)
    rebuilt = truncated(spectrum, rows)
    torch.testing.assert_close(x @ rebuilt.T, x @ weight.T, rtol=1e-7, atol=1e-7)
    assert torch.isfinite(spectrum.left).all()


@shapes
def test_dead_channels_zero_and_rank_one_weights(shape):
    second = gram(8, shape[1], 50)
    second[:, :5] = 0
    second[:5] = 0
    for weight in (torch.zeros(shape, dtype=torch.float64), random(1, shape[0], 1) @ random(2, 1, shape[1])):
        spectrum = decompose(weight, second)
        assert torch.isfinite(spectrum.right).all()
        torch.testing.assert_close(truncated(spectrum, 1), weight, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_energies_descend_and_full_rank_is_exact(m, n, seed):
    weight = random(seed, m, n)
    spectrum = decompose(weight, gram(seed + 1, n, 3 * n))
    assert (spectrum.energies.diff() <= 1e-12).all()
    torch.testing.assert_close(truncated(spectrum, min(m, n)), weight, rtol=1e-6, atol=1e-7)


def test_the_inputs_are_not_changed():
    weight, second = random(1, 6, 8), gram(2, 8, 30)
    before = weight.clone(), second.clone()
    decompose(weight, second)
    assert torch.equal(weight, before[0])
    assert torch.equal(second, before[1])


def test_a_non_finite_weight_is_an_error():
    weight = torch.ones(3, 3)
    weight[1, 1] = float("nan")
    with pytest.raises(ArithmeticError, match="non-finite"):
        decompose(weight)


def test_retruncation_equals_the_svd_of_the_product():
    left, right = random(1, 30, 8), random(2, 8, 20)
    spectrum = retruncate(left, right)
    u, s, vt = torch.linalg.svd(left @ right, full_matrices=False)
    torch.testing.assert_close(truncated(spectrum, 3), (u[:, :3] * s[:3]) @ vt[:3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spectrum.energies, s[:8] ** 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize("shape", [(24, 7, 40), (40, 9, 24), (6, 9, 24)])
def test_retruncation_in_a_metric_equals_the_decomposition_of_the_product(sides, shape):
    m, r, n = shape
    left, right = random(1, m, r), random(2, r, n)
    inputs = gram(3, n, 200) if sides != "output" else None
    outputs = gram(4, m, 200) if sides != "input" else None
    found, expected = retruncate(left, right, inputs, outputs), decompose(left @ right, inputs, outputs)
    rank = min(m, r)
    torch.testing.assert_close(found.energies, expected.energies[:rank], rtol=1e-6, atol=1e-9)
    assert expected.energies[rank:].sum() < 1e-9 * expected.energies.sum()
    for k in (1, 4, rank):
        torch.testing.assert_close(truncated(found, k), truncated(expected, k), rtol=1e-5, atol=1e-7)


def test_a_randomised_decomposition_is_near_the_exact_one():
    left = random(1, 200, 64) * torch.logspace(0, -2, 64, dtype=torch.float64)
    right = random(2, 64, 150)
    exact = retruncate(left, right)
    found = randomised(left, right, 10, torch.Generator().manual_seed(0))
    assert found.left.shape == (200, 10)
    error = float((left @ right - truncated(found, 10)).square().sum())
    assert exact.errors()[10] <= error * (1 + 1e-9)
    assert error < 1.001 * exact.errors()[10]
    torch.testing.assert_close(found.energies, exact.energies[:10], rtol=1e-2, atol=0)
    assert product_energy(left, right) == pytest.approx(float((left @ right).square().sum()))


@pytest.mark.parametrize("weak", [0, 1, 12, 40, 64])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-7])
def test_weak_directions_of_a_tall_weight_stay_orthonormal_and_nested(weak, size):
    rows, columns = torch.linalg.qr(random(0, 150, 64)).Q, torch.linalg.qr(random(1, 64, 64)).Q
    values = torch.linspace(2, 1, 64, dtype=torch.float64)
    values[64 - weak :] *= size
    weight = (rows * values) @ columns
    spectrum = decompose(weight)
    eye = torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(spectrum.left.T @ spectrum.left, eye, rtol=0, atol=1e-7)
    torch.testing.assert_close(spectrum.left @ spectrum.right, weight, rtol=0, atol=1e-13)
    for rank in (1, 20, 63):
        found, best = (truncated(spectrum, rank) - weight).norm(), values[rank:].norm()
        assert best * (1 - 1e-9) - 1e-11 <= found <= best * 1.1 + 1e-11


@pytest.mark.parametrize("shape", [(900, 120), (120, 300), (150, 150)])
@pytest.mark.parametrize("width", [1.0, 1e-3])
def test_a_float32_weight_loses_no_more_than_its_rounding(shape, width):
    """Products with singular vectors are float32 then: of a well conditioned weight and, in float64 again, another."""
    scales = torch.logspace(0, float(torch.tensor(width).log10()), min(shape), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(random(1, *shape), full_matrices=False)
    weight, second = ((u * scales) @ vt).float(), gram(2, shape[1], 4 * shape[1])
    ours, exact = decompose(weight, second), decompose(weight.double(), second)
    assert ours.left.dtype == torch.float32
    torch.testing.assert_close(ours.energies, exact.energies, rtol=1e-6, atol=1e-14)
    for rank in (5, 60, 100):
        best = error(weight.double() - truncated(exact, rank), second)
        lost = error(weight.double() - truncated(ours, rank).double(), second)
        assert lost <= best * 1.001 + 1e-11 * float(exact.energies.sum())


def test_a_float32_weight_of_deficient_rank_has_orthonormal_factors():
    weight, second = (random(1, 400, 20) @ random(2, 20, 80)).float(), gram(3, 80, 300)
    spectrum = decompose(weight, second)
    torch.testing.assert_close(spectrum.left.T @ spectrum.left, torch.eye(80), rtol=0, atol=1e-3)
    torch.testing.assert_close(truncated(spectrum, 20), weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(90, 400), (400, 90)])
@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_the_leading_components_alone_are_nearly_the_best(shape, outputs, flat):
    weight = random(1, *shape)
    inputs = gram(2, shape[1], 1000) if not flat else None
    metric = None if outputs is None else gram(outputs, shape[0], 1000) + 0.1 * torch.eye(shape[0])
    best, found = decompose(weight, inputs, metric), leading(weight, 6, inputs, metric)
    assert found.left.shape == (shape[0], 6)
    assert found.right.shape == (6, shape[1])
    assert found.energies.shape == best.energies.shape
    assert best.errors()[6] <= found.errors()[6] * (1 + 1e-6)
    assert found.errors()[6] <= best.errors()[6] * (1.02 if flat else 1.001)
    torch.testing.assert_close(found.energies.sum(), best.energies.sum(), rtol=1e-5, atol=0)
    left, right = (
        torch.eye(n, dtype=torch.float64) if g is None else g for n, g in zip(shape, (metric, inputs), strict=True)
    )
    lost = weight - found.left @ found.right
    assert float((left @ lost @ right * lost).sum()) == pytest.approx(float(found.errors()[6]), rel=1e-4)


@shapes
def test_singular_values_from_the_smaller_gram(shape):
    weight = random(4, *shape)
    torch.testing.assert_close(
        singular_values(weight.float()), torch.linalg.svdvals(weight.float().double()), rtol=1e-9, atol=1e-9
    )
