"""Products by compiled panels: against float64, on this processor and on others, whatever calls them."""

import shutil

import pytest
import torch

from lrcompress.kernels import panels, products
from lrcompress.kernels.rows import NumberRows
from tests.commands import run_code
from tests.kernels import weights as examples

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

SHAPES = [(1, 1), (63, 31), (64, 2048), (129, 33), (200, 2049), (1030, 70), (70, 4100)]
"""(rows, columns): less and more than a panel and its depth, odd ones too."""


def exact(x, weight):
    return x.double() @ weight.double().T


def check(found, x, weight):
    """Results are float32 sums (each step may be off by 2^-24 of the sum of sizes), rounded to bfloat16 (2^-9)."""
    sizes = x.double().abs() @ weight.double().abs().T
    allowed = 2**-8 * exact(x, weight).abs() + (weight.shape[1] + 1) * 2**-23 * sizes
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact(x, weight)).abs() <= allowed).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_multiplied(shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = examples.random(*shape).bfloat16()
        for count in (0, 1, 5, 6, 97):
            x = examples.random(count, shape[1]).bfloat16()
            check(panels.product(x, shape, weight), x, weight)
    finally:
        torch.set_num_threads(before)


def test_more_rows_than_are_summed_at_once():
    x, weight = examples.random(5003 * 6, 4).bfloat16(), examples.random(3, 4).bfloat16()
    check(panels.product(x, (3, 4), weight), x, weight)


def test_an_input_that_begins_anywhere():
    x, weight = examples.random(7 * 40 + 1).bfloat16()[1:].view(7, 40), examples.random(9, 40).bfloat16()
    check(panels.product(x, (9, 40), weight), x, weight)
    turned = examples.random(40, 7).bfloat16().T
    check(panels.product(turned, (9, 40), weight), turned, weight)


@pytest.mark.parametrize("block", [4, 1024])
def test_results_are_put_into_the_order_of_a_block(block):
    rows, weight = 2050, examples.random(2050, 6).bfloat16()
    x = examples.random(8, 6).bfloat16()
    order = torch.cat([torch.randperm(min(block, rows - first)) for first in range(0, rows, block)])
    found = panels.product(x, (rows, 6), weight, order=order.to(torch.int16), block=block)
    placed = torch.empty_like(weight)
    placed[torch.arange(rows) // block * block + order] = weight
    check(found, x, placed)


def test_what_is_no_number_stays_in_its_row():
    x, weight = examples.random(9, 33).bfloat16(), examples.random(70, 33).bfloat16()
    x[4, 32], weight[60, 32] = torch.nan, torch.inf
    found = panels.product(x, (70, 33), weight).isfinite()
    expected = torch.ones(9, 70, dtype=torch.bool)
    expected[4], expected[:, 60] = False, False
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", examples.SHAPES)
def test_every_stored_weight_is_multiplied_so(shape, monkeypatch):
    monkeypatch.setattr(panels, "fast", lambda: True)
    monkeypatch.setattr(products, "MANY_OF_NUMBERS", 9)
    for name, weight in examples.weights(*shape, torch.bfloat16):
        taken = products.way(weight, 30, torch.bfloat16) == products.COMPILED_PANELS
        assert taken or "groups of 7" in name, name
        x = examples.random(30, shape[1]).bfloat16()
        check(products.multiply(x, weight, transposed=False), x, weight.numbers(0, shape[0]))
        if isinstance(weight, NumberRows):
            check(products.linear(x[None], weight.values)[0], x, weight.values)


OTHERS = """
import torch
from lrcompress.kernels import panels
from tests.kernels.test_panels import SHAPES, check
from tests.kernels.weights import random
for shape in SHAPES:
    x, weight = random(7, shape[1]).bfloat16(), random(*shape).bfloat16()
    check(panels.product(x, shape, weight), x, weight)
print(panels.fast())
"""


@pytest.mark.parametrize("compiler", ["cc -mno-avx512bf16", "cc -mno-avx512f", "cc -mno-avx"])
def test_other_processors_multiply_alike(compiler):
    done = run_code(OTHERS, environment={"CC": compiler})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"], "torch is as fast where the processor has no products of bfloat16"
