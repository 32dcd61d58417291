"""Pivot rows reproduce the others."""

import pytest
import torch

from lrcompress.linalg.pivoting import LARGEST, pivot_rows


@pytest.mark.parametrize(("m", "r"), [(10, 1), (40, 13), (64, 63), (200, 50), (576, 300)])
def test_pivots_span_the_other_rows(m, r):
    basis = torch.randn(m, r, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    pivots, others, coefficients = pivot_rows(basis)
    assert sorted([*pivots.tolist(), *others.tolist()]) == list(range(m))
    torch.testing.assert_close(coefficients @ basis[pivots], basis[others], rtol=1e-9, atol=1e-9)
    assert coefficients.abs().max() <= LARGEST


def test_scaling_of_the_columns_does_not_matter():
    basis = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = basis * torch.logspace(0, -9, 12, dtype=torch.float64)
    pivots, others, coefficients = pivot_rows(scaled)
    torch.testing.assert_close(coefficients @ basis[pivots], basis[others], rtol=1e-5, atol=1e-5)


def test_rows_are_exchanged_where_elimination_chooses_badly():
    """Kahan's kind of matrix: elimination takes the first rows, whose coefficients grow like powers of two."""
    lower = torch.eye(12, dtype=torch.float64) - torch.ones(12, 12, dtype=torch.float64).tril(-1)
    basis = torch.cat([lower, torch.ones(3, 12, dtype=torch.float64)])
    grown = torch.linalg.solve(basis[:12], basis[12:], left=False).abs().max()
    assert grown > 1000
    pivots, others, coefficients = pivot_rows(basis)
    torch.testing.assert_close(coefficients @ basis[pivots], basis[others], rtol=1e-9, atol=1e-9)
    assert coefficients.abs().max() <= LARGEST


def test_a_deficient_basis_has_finite_coefficients():
    zero = torch.zeros(9, 3)
    flat = torch.randn(9, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 3)
    for basis in (zero, flat):
        pivots, others, coefficients = pivot_rows(basis)
        torch.testing.assert_close(coefficients @ basis[pivots], basis[others], rtol=1e-5, atol=1e-6)
