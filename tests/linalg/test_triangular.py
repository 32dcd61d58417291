"""What is done by panels, against the whole in float64."""

import pytest
import torch

from lrcompress.linalg.triangular import energy_between, inverse_column_norms


def unit_upper(size: int, seed: int) -> torch.Tensor:
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.eye(size, dtype=torch.float64) + noise.triu(1) / size**0.5


@pytest.mark.parametrize(("size", "panel", "block"), [(1, 4, 2), (9, 4, 3), (16, 8, 8), (21, 8, 3), (7, 16, 4)])
def test_norms_are_those_of_the_inverse(size, panel, block):
    factor = unit_upper(size, 0)
    norms = inverse_column_norms(factor, panel, block)
    torch.testing.assert_close(norms, torch.linalg.inv(factor).square().sum(0))


@pytest.mark.parametrize(("m", "n", "panel"), [(1, 1, 4), (9, 5, 4), (5, 9, 4), (8, 16, 8), (3, 2, 16)])
def test_the_energy_is_that_of_the_product(m, n, panel):
    left, right = unit_upper(m, 1), unit_upper(n, 2)
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(energy_between(left, matrix, right, panel), (left.T @ matrix @ right).square().sum())
