"""Sums of Grams against the plain product."""

import pytest
import torch

from lrcompress.grams import add_gram, energy, quadratic, symmetric


@pytest.mark.parametrize("n", [1, 127, 300, 1100])
def test_panels_add_up_to_the_product(n):
    first, second = (torch.randn(40, n, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    upper = torch.zeros(n, n, dtype=torch.float64)
    add_gram(upper, first)
    add_gram(upper, second)
    rows = torch.cat([first, second]).double()
    found = symmetric(upper)
    torch.testing.assert_close(found, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize(("m", "n"), [(1, 5), (300, 40), (40, 1100)])
def test_a_quadratic_form_and_its_trace(m, n):
    matrix, rows = (torch.randn(size, n, generator=torch.Generator().manual_seed(size)) for size in (m, n + 7))
    gram = rows.T @ rows
    found, whole = quadratic(matrix.double(), gram.double()), matrix.double() @ gram.double() @ matrix.double().T
    torch.testing.assert_close(found, whole)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(quadratic(matrix.double()), matrix.double() @ matrix.double().T)
    assert float(energy(matrix.double(), gram.double())) == pytest.approx(float(whole.trace()), rel=1e-12)
    assert float(energy(matrix, gram.double())) == pytest.approx(float(whole.trace()), rel=1e-5)
    assert float(energy(matrix)) == pytest.approx(float(matrix.double().square().sum()), rel=1e-12)
