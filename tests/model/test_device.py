"""Products in float32 wherever they are made."""

import pytest
import torch

from lrcompress.model import device


@pytest.mark.parametrize("exact", [True, False])
def test_fast_products_are_float32s_and_the_setting_comes_back(monkeypatch, exact):
    if not exact:
        monkeypatch.setattr(device, "_onednn_is_exact", lambda: False)
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(300, 700, generator=generator), torch.randn(500, 700, generator=generator)
    before = torch.get_float32_matmul_precision()
    with device.fast_float32():
        inside = torch.get_float32_matmul_precision()
        ours = torch.nn.functional.linear(x, w), x.T @ x
    assert exact or inside == before
    for found, expected in zip(ours, (x.double() @ w.double().T, x.double().T @ x.double()), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.get_float32_matmul_precision() == before


def test_the_setting_comes_back_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), device.fast_float32():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
