"""Steps of factor pairs against their definitions, by independent dense solves."""

import pytest
import torch
from torch import Tensor

from lrcompress.linalg.factor_pairs import (
    closest_pivoted_step,
    closest_step,
    nearest_gauge,
    scaled_step,
    sylvester,
)
from lrcompress.linalg.truncation import retruncate

SHAPES = [(7, 5, 3), (4, 9, 4), (6, 6, 1), (8, 3, 2)]


def pair(m: int, n: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors whose singular values lie between 1 and 2, so that the damping is not seen, and a full gradient."""
    generator = torch.Generator().manual_seed(m * 100 + n * 10 + r)
    left, right, full = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((m, r), (n, r), (m, n))
    )
    mix = torch.diag(1 + torch.rand(r, generator=generator, dtype=torch.float64))
    return torch.linalg.qr(left).Q @ mix, (torch.linalg.qr(right).Q @ mix).T, full


def jacobian(left: Tensor, right: Tensor) -> Tensor:
    """The linear map from (dB, dA), flattened, to dB A + B dA, column by column."""
    m, r, n = left.shape[0], left.shape[1], right.shape[1]
    columns = []
    for i in range(m * r):
        unit = torch.zeros(m * r, dtype=left.dtype)
        unit[i] = 1
        columns.append((unit.view(m, r) @ right).flatten())
    for i in range(r * n):
        unit = torch.zeros(r * n, dtype=left.dtype)
        unit[i] = 1
        columns.append((left @ unit.view(r, n)).flatten())
    return torch.stack(columns, dim=1)


def least_squares(matrix: Tensor, full: Tensor) -> Tensor:
    """The nearest to `full` among what `matrix` can make."""
    solution = torch.linalg.lstsq(matrix, full.flatten(), driver="gelsd").solution
    return (matrix @ solution).view_as(full)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("step", [closest_step, nearest_gauge])
def test_the_step_is_the_least_squares_optimum(step, m, n, r):
    left, right, full = pair(m, n, r)
    d_left, d_right = step(left, right, full @ right.T, left.T @ full)
    torch.testing.assert_close(
        left @ d_right + d_left @ right, least_squares(jacobian(left, right), full), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_it_is_at_least_as_near_to_the_full_gradient_as_any_multiple_of_plain_steps(m, n, r):
    left, right, full = pair(m, n, r)
    left_grad, right_grad = full @ right.T, left.T @ full
    d_left, d_right = nearest_gauge(left, right, left_grad, right_grad)
    ours = (left @ d_right + d_left @ right - full).norm()
    plain = left @ right_grad + left_grad @ right
    best = (plain * full).sum() / plain.square().sum()  # the most favourable learning rate
    for rate in (best, 1.0, 0.1):
        assert ours <= (rate * plain - full).norm() + 1e-9


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_of_all_optimal_pairs_the_gauge_is_nearest_to_the_plain_gradients(m, n, r):
    left, right, full = pair(m, n, r)
    left_grad, right_grad = full @ right.T, left.T @ full
    found = torch.cat([part.flatten() for part in nearest_gauge(left, right, left_grad, right_grad)])
    # Every optimal pair is a particular one plus the null space of the map: solve for that part directly.
    matrix, plain = jacobian(left, right), torch.cat([left_grad.flatten(), right_grad.flatten()])
    particular = torch.linalg.lstsq(matrix, full.flatten(), driver="gelsd").solution
    _, s, vt = torch.linalg.svd(matrix)
    null = vt[int((s > 1e-10 * s[0]).sum()) :].T
    wanted = particular + null @ (null.T @ (plain - particular))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("m", "n", "r"), [(7, 5, 3), (9, 4, 4), (6, 6, 1), (5, 8, 4)])
def test_a_pivoted_pair_makes_the_best_step_that_its_parameters_can(m, n, r):
    rest, pivot, _ = pair(m - r, n, r) if m - r >= r else (pair(r, n, r)[0][: m - r], pair(r, n, r)[1], None)
    full = torch.randn(m, n, generator=torch.Generator().manual_seed(m), dtype=torch.float64)

    def weight(c: Tensor, p: Tensor) -> Tensor:
        return torch.cat([p, c @ p])

    c, p = rest.clone().requires_grad_(), pivot.clone().requires_grad_()
    (weight(c, p) * full).sum().backward()
    d_rest, d_pivot = closest_pivoted_step(rest, pivot, c.grad, p.grad)
    jac = torch.autograd.functional.jacobian(weight, (rest, pivot))
    matrix = torch.cat([part.reshape(m * n, -1) for part in jac], dim=1)
    made = (matrix @ torch.cat([d_rest.flatten(), d_pivot.flatten()])).view(m, n)
    torch.testing.assert_close(made, least_squares(matrix, full), rtol=1e-6, atol=1e-6)
    # The identity costs nothing: a free pair of the same weight reaches no further.
    left = torch.cat([torch.eye(r, dtype=torch.float64), rest])
    torch.testing.assert_close(made, least_squares(jacobian(left, pivot), full), rtol=1e-6, atol=1e-6)


def test_rank_deficient_factors_give_finite_steps():
    left, right, full = pair(6, 5, 3)
    left[:, 2], right[2] = 0, 0
    for part in nearest_gauge(left, right, full @ right.T, left.T @ full):
        assert torch.isfinite(part).all()


@pytest.mark.parametrize("pivoted", [False, True])
def test_scaled_steps_move_the_weight_alike_whatever_the_balance_of_the_factors(pivoted):
    left, right, full = pair(7, 5, 3)
    if pivoted:
        whole = torch.cat([torch.eye(3, dtype=torch.float64), left])
        full = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        d_left, d_right = scaled_step(left, right, (full @ right.T)[3:], whole.T @ full, pivoted=True)
        inverse = torch.linalg.inv(whole.T @ whole)
        torch.testing.assert_close(d_right, inverse @ whole.T @ full, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(d_left, full[3:] @ right.T @ torch.linalg.inv(right @ right.T), rtol=1e-6, atol=1e-6)
        return
    moves = []
    for scale in (1.0, 100.0):
        b, a = left * scale, right / scale
        d_b, d_a = scaled_step(b, a, full @ a.T, b.T @ full, pivoted=False)
        moves.append(b @ d_a + d_b @ a)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-6, atol=1e-6)


def test_sylvester_solves_its_equation():
    generator = torch.Generator().manual_seed(0)
    a, b, rhs = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    a, b = a @ a.T, b @ b.T
    x = sylvester(a, b, rhs)
    torch.testing.assert_close(a @ x + x @ b, rhs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_the_decomposition_of_a_pair_is_that_of_its_product(m, n, r):
    left, right, _ = pair(m, n, r)
    spectrum = retruncate(left, right)
    u, s = spectrum.left, spectrum.energies.sqrt()
    vt = spectrum.right / s[:, None]
    torch.testing.assert_close((u * s) @ vt, left @ right)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[:r])
    torch.testing.assert_close(u.T @ u, torch.eye(r, dtype=torch.float64))
