"""Products with stored weights: compiled, by panels and in plain torch, against float64 and against each other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrcompress.kernels import products
from lrcompress.kernels.products import COMPILED, FEW, GATHERED, PANELS, PLAIN, way
from lrcompress.kernels.rows import QuantizedRows
from lrcompress.model.device import resolve_device
from tests.kernels import weights as examples

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", examples.SHAPES)
def test_products_are_those_of_the_numbers(shape, dtype):
    for name, weight in examples.weights(*shape, dtype):
        for count in examples.COUNTS:
            examples.check(name, weight, count, dtype)


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_on_this_machines_device(dtype):
    device = resolve_device("auto")
    for name, weight in examples.weights(24, 40, dtype):
        for count in (1, 40):
            examples.check(name, examples.moved(weight, device), count, dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"ATEN_CPU_CAPABILITY": "default"},
        {"ATEN_CPU_CAPABILITY": "avx2"},
        {"ATEN_CPU_CAPABILITY": "avx512"},
        {"LRCOMPRESS_NATIVE": "0"},
        {"CC": "cc -mno-avx512f"},
        {"CC": "cc -mno-avx"},
    ],
    ids=lambda settings: " ".join(settings.values()),
)
def test_products_on_other_processors(settings):
    """torch's kernels for less, ours for less, and none of ours."""
    code = "from tests.kernels.weights import check_some; check_some()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env={**os.environ, **settings}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", examples.SHAPES)
def test_compiled_panels_are_the_numbers_bit_for_bit(shape, dtype, monkeypatch):
    monkeypatch.setattr(products, "PANEL", 3 * shape[1] * dtype.itemsize)  # rows three by three
    for name, weight in examples.weights(*shape, dtype):
        panels = [(start, panel.clone()) for start, panel in products._panels(weight, dtype)]
        assert [start for start, _ in panels] == list(range(0, shape[0], 3))
        assert torch.equal(torch.cat([panel for _, panel in panels]), weight.numbers(0, shape[0])), name


@needs_compiler
def test_what_is_compiled_is_taken():
    for dtype in (torch.float32, torch.bfloat16):
        for name, weight in examples.weights(24, 40, dtype):
            odd = "groups of 7" in name
            assert way(weight, 1, dtype) == (PLAIN if odd else COMPILED), name
            few = "numbers" in name and dtype == torch.float32 and not name.startswith("40 ")
            assert way(weight, 100, dtype) == (PLAIN if odd else GATHERED if few else PANELS), name
            assert way(weight, 100, dtype, transposed=True) == (PLAIN if odd else PANELS)
            assert way(weight, 1, torch.float16) == PLAIN


def test_values_that_are_no_numbers_stay_so():
    weight = examples.sparse(3, 40, torch.float32, 10, 16, "mask")
    weight.values[0, 0], weight.values[1, 0] = torch.inf, torch.nan
    found = torch.cat([panel for _, panel in products._panels(weight, torch.bfloat16)])
    torch.testing.assert_close(found, weight.numbers(0, 3).bfloat16(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, FEW + 1, 100])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_dense_product(count, transposed):
    for name, weight in examples.weights(24, 40, torch.float32):
        x = examples.random(count, 24 if transposed else 40).requires_grad_(True)
        call = {"QuantizedRows": products.quantized, "SparseRows": products.sparse, "PairRows": products.pairs}
        y = call[type(weight).__name__](x, weight, transposed=transposed)
        y.backward(gradient := examples.random(*y.shape))
        whole = weight.numbers(0, 24)
        expected = gradient @ (whole.T if transposed else whole)
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name)


def test_gradients_of_gradients():
    weight = examples.quantized(5, 16, torch.float64, 4, 16)
    x = examples.random(3, 16).double().requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda x: products.quantized(x, weight) ** 2, (x,))


def test_operators_are_what_torch_expects():
    own = torch.ops.lrcompress
    q, s, p = (make(24, 40, torch.float32, *more) for make, more in (
        (examples.quantized, (4, 32)), (examples.sparse, (10, 8, "mask")), (examples.pairs, ()),
    ))  # fmt: skip
    for x in (examples.random(3, 40), examples.random(3, 40).requires_grad_(True)):
        torch.library.opcheck(own.quantized.default, (x, q.codes, q.zeros, q.scale, 4, 40, 32, False))
        torch.library.opcheck(own.sparse.default, (x, s.values, s.scale, s.positions, 40, False))
        torch.library.opcheck(own.pairs.default, (x, p.values, p.positions, 40, False))


def test_any_dimensions():
    weight = examples.quantized(24, 40, torch.float32, 4, 32)
    for shape in ((40,), (0, 40), (2, 0, 40), (2, 3, 40)):
        x = torch.ones(shape)
        found = products.quantized(x, weight)
        torch.testing.assert_close(found, x @ weight.numbers(0, 24).T)
    torch.testing.assert_close(
        products.quantized(torch.ones(40, 3).T, weight), torch.ones(3, 40) @ weight.numbers(0, 24).T
    )


def test_codes_at_the_end_of_a_page_are_not_read_beyond():
    """Codes that end where their memory does: a file that is mapped, say."""
    import mmap

    rows, columns = 3, 88
    whole = examples.quantized(rows, columns, torch.float32, 3, columns)
    size = whole.codes.numel()
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    page = torch.frombuffer(memory, dtype=torch.uint8)
    codes = page[-size:].view(whole.codes.shape)
    codes.copy_(whole.codes)
    weight = QuantizedRows(codes, whole.zeros, whole.scale, 3, columns, columns)
    x = examples.random(1, columns)
    assert torch.equal(products.quantized(x, weight), products.quantized(x, whole))
