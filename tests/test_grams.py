"""Sums of Grams against the plain product."""

import pytest
import torch

from lrcompress.grams import add_gram, symmetric


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
