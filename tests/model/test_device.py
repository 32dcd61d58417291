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
    with pytest.raises(ZeroDivisionError), device.fast_float32():
        if not exact:
            assert torch.get_float32_matmul_precision() == before
        torch.testing.assert_close(
            torch.nn.functional.linear(x, w).double(), x.double() @ w.double().T, rtol=1e-4, atol=1e-3
        )
        torch.testing.assert_close((x.T @ x).double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-3)
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
