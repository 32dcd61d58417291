"""Pivot rows reproduce the others."""

import pytest
import torch

from lrcompress.linalg.pivoting import pivot_rows


@pytest.mark.parametrize(("m", "r"), [(10, 1), (40, 13), (64, 63), (200, 50)])
def test_pivots_span_the_other_rows(m, r):
    basis = torch.randn(m, r, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    pivots, others, coefficients = pivot_rows(basis)
    assert sorted([*pivots.tolist(), *others.tolist()]) == list(range(m))
    torch.testing.assert_close(coefficients @ basis[pivots], basis[others], rtol=1e-9, atol=1e-9)
    assert coefficients.abs().max() < 10


def test_scaling_of_the_columns_does_not_matter():
    basis = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = basis * torch.logspace(0, -9, 12, dtype=torch.float64)
    pivots, others, coefficients = pivot_rows(scaled)
    torch.testing.assert_close(coefficients @ basis[pivots], basis[others], rtol=1e-5, atol=1e-5)
