import math

import pytest
import torch

from lrcompress.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_anywhere_is_found(dtype, bad):
    for place in (0, 1700, 5 * 7 * 100 - 1):
        tensor = torch.randn(5, 7, 100).to(dtype)
        assert all_finite(tensor)
        tensor.view(-1)[place] = bad
        assert not all_finite(tensor)
        assert not all_finite(tensor.mT)


def test_extremes_and_nothing_are_finite():
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]))
    assert all_finite(torch.ones(3, requires_grad=True))
