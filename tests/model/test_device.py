"""What a device can do: products in float32, float64 or none."""

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.model import device
from lrcompress.recipe import make_recipe
from lrcompress.stages.request import check_request


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


def test_a_device_without_float64_sums_in_float32(monkeypatch, llama):
    """Apple's has none: where it is named it compresses all the same; what compares logits goes to the CPU."""
    other = torch.device("meta")  # raises as a device without float64 does
    assert device.statistics_device("cpu") == torch.device("cpu") == device.double_device(torch.device("cpu"))
    monkeypatch.setattr(device, "resolve_device", lambda name: other)
    assert device.statistics_device("mps") == other
    assert device.statistics_device("auto") == device.double_device(other) == torch.device("cpu")
    asked = make_recipe({"model": str(llama), "method": "lord", "ratio": 0.2, "device": "meta"})
    assert check_request(asked).device == other
    monkeypatch.setenv("LRCOMPRESS_WIDE", "float64")
    with pytest.raises(InputError, match="LRCOMPRESS_WIDE=float64 cannot be had, device meta has none"):
        check_request(asked)
