"""Products with stored weights: compiled, by panels and in plain torch, against float64 and against each other."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from lrcompress.formats.base import KernelLinear
from lrcompress.kernels import panels, products, tiled_products
from lrcompress.kernels.placing import placed
from lrcompress.kernels.products import (
    COMPILED,
    COMPILED_PANELS,
    DENSE_PRODUCT,
    FEW,
    GATHERED,
    MANY_OF_NUMBERS,
    PANELS,
    PLAIN,
    way,
)
from lrcompress.kernels.rows import NumberRows, QuantizedRows
from lrcompress.model.device import resolve_device
from tests.commands import run_code
from tests.kernels import weights as examples
from tests.kernels.test_tiles import example as tile_example
from tests.kernels.test_tiles import packed

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
    code = "import torch; from tests.kernels.weights import check_some; check_some(); " \
           "print(torch.backends.cpu.get_cpu_capability())"  # fmt: skip
    done = run_code(code, environment=settings)
    assert done.returncode == 0, done.stderr
    if settings.get("ATEN_CPU_CAPABILITY") == "default":
        assert done.stdout.split() == ["DEFAULT"], "torch had chosen its kernels before"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", examples.SHAPES)
def test_compiled_panels_are_the_numbers_bit_for_bit(shape, dtype, monkeypatch):
    monkeypatch.setattr(products, "PANEL", 3 * shape[1] * dtype.itemsize)  # rows three by three
    for name, weight in examples.weights(*shape, dtype):
        found = [(start, panel.clone()) for start, panel in products._panels(weight, dtype)]
        assert [start for start, _ in found] == list(range(0, shape[0], 3))
        assert torch.equal(torch.cat([panel for _, panel in found]), weight.numbers(0, shape[0])), name


@needs_compiler
@pytest.mark.parametrize("fast", [False, True], ids=["torch multiplies panels", "compiled code does"])
def test_what_is_compiled_is_taken(fast, monkeypatch):
    monkeypatch.setattr(panels, "fast", lambda: fast)
    for dtype in (torch.float32, torch.bfloat16):
        by_panels = COMPILED_PANELS if fast and dtype == torch.bfloat16 else PANELS
        for name, weight in examples.weights(24, 40, dtype):
            odd, plain = "groups of 7" in name, name == "as they are"
            assert way(weight, 1, dtype) == (PLAIN if odd else COMPILED), name
            few = "numbers" in name and dtype == torch.float32 and not name.startswith("40 ")
            many = DENSE_PRODUCT if plain else PLAIN if odd else by_panels
            assert way(weight, 100, dtype) == (GATHERED if few else many), name
            assert way(weight, 100, dtype, transposed=True) == (PANELS if many == COMPILED_PANELS else many)
            whole = by_panels if plain and by_panels == COMPILED_PANELS else many
            assert way(weight, MANY_OF_NUMBERS, dtype) == (GATHERED if few else whole), name
            assert way(weight, 1, torch.float16) == (DENSE_PRODUCT if plain else PLAIN)


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
        plain = type(weight) is NumberRows
        call, given = (products.linear, weight.values) if plain else (call[type(weight).__name__], weight)
        y = call(x, given, transposed=transposed)
        y.backward(gradient := examples.random(*y.shape))
        whole = weight.numbers(0, 24)
        expected = gradient @ (whole.T if transposed else whole)
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name)


@pytest.mark.parametrize("count", [1, FEW + 1, 100])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_codes_learn_without_a_whole_weight(count, transposed, dtype):
    """Their gradient by autograd through the plain numbers in float64; x and the product in `dtype`, scales float32."""
    for _, weight in examples.weights(24, 40, torch.float32):
        if not isinstance(weight, QuantizedRows):
            continue
        x = examples.random(2, count, 24 if transposed else 40)
        scale = weight.scale.clone().requires_grad_(True)
        y = products.quantized(x.to(dtype), replace(weight, scale=scale), transposed=transposed)
        y.backward(gradient := examples.random(*y.shape).to(dtype))
        exact = weight.scale.double().requires_grad_(True)
        whole = replace(weight, scale=exact).numbers(0, 24)
        (x.double() @ (whole if transposed else whole.T)).backward(gradient.double())
        assert scale.grad.dtype == torch.float32
        error = (scale.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.02)


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
        learnt = q.scale.clone().requires_grad_(True)
        torch.library.opcheck(own.quantized.default, (x, q.codes, q.zeros, learnt, 4, 40, 32, False))
        torch.library.opcheck(own.sparse.default, (x, s.values, s.scale, s.positions, 40, False))
        torch.library.opcheck(own.pairs.default, (x, p.values, p.positions, 40, False))
        torch.library.opcheck(own.numbers.default, (x, examples.random(24, 40), False))
    order = torch.randperm(43).to(torch.int16)
    torch.library.opcheck(
        own.placed.default, (examples.random(2, 3), examples.random(2, 40), order),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "watch",
    [
        lambda f, x: torch.jit.trace(f, (x,)),
        lambda f, x: make_fx(f)(x),
        lambda f, x: torch.compile(f, backend="aot_eager", fullgraph=True),
        lambda f, x: lambda x: [y[0] for y in torch.func.vmap(f)(x[None])],
        lambda f, x: f,
    ],
    ids=["jit.trace", "make_fx", "compile", "vmap", "nothing"],
)
@torch.no_grad()
def test_what_watches_operators_sees_them(watch):
    """What was recorded with one x computes with another, which it would not where a result had become a constant."""
    weight = examples.quantized(24, 40, torch.float32, 4, 40)
    codes, levels, indices, _ = tile_example((24, 40), dtype=torch.int8)
    held = packed(codes)

    def run(x):
        tiled = tiled_products.linear(x, held, levels, indices)
        return products.quantized(x, weight), products.linear(x, weight.numbers(0, 24)), tiled

    x = examples.random(3, 40)
    watched = watch(run, x)
    for found, wanted in zip(watched(2 * x), run(2 * x), strict=True):
        torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_weights_that_stand_for_others_are_multiplied_by_torch():
    """A batch of them under vmap, and a subclass of a tensor, whose numbers lie elsewhere."""
    layer, weights = KernelLinear(8, 6, bias=False), examples.random(3, 6, 8)
    x = examples.random(1, 8)
    found = torch.func.vmap(lambda weight: torch.func.functional_call(layer, {"weight": weight}, (x,)))(weights)
    torch.testing.assert_close(found, x @ weights.transpose(1, 2))
    layer.weight = torch.nn.Parameter(TwoTensor(weights[0].clone(), weights[1].clone()))
    torch.testing.assert_close(layer(x).a, x @ weights[0].T)


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


def test_a_matrix_learns_and_takes_few_rows_of_any_layout():
    """Gradients of W come from torch; a transposed W, and rows that are parts of longer ones, are read as they lie."""
    values = examples.random(24, 40).requires_grad_(True)
    x = examples.random(3, 40)
    products.linear(x, values).sum().backward()
    torch.testing.assert_close(values.grad, x.sum(0).expand(24, 40))
    with torch.no_grad():
        for other in (values.T.contiguous().T, torch.cat([values, values], dim=1)[:, :40]):
            torch.testing.assert_close(products.linear(x, other), x @ values.T)
            torch.testing.assert_close(products.linear(x[:, :24], other, transposed=True), x[:, :24] @ values)


def test_autocast_computes_in_its_dtype():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert products.linear(examples.random(1, 40), examples.random(24, 40)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("index", [torch.int16, torch.int32])
@pytest.mark.parametrize("rows", [0, 1, 4000])
def test_outputs_are_put_into_their_places(dtype, index, rows):
    first, rest = examples.random(2, rows, 5).to(dtype), examples.random(2, rows, 40).to(dtype)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0)).to(index)
    both = torch.cat([first, rest], dim=-1)
    assert torch.equal(placed(first, rest, order), both[..., order.long()])
    assert torch.equal(placed(first, both[..., 5:], order), both[..., order.long()])  # a part of longer rows


def test_one_row_without_a_dimension_of_rows():
    first, rest, order = torch.arange(2.0), torch.arange(2.0, 5.0), torch.tensor([4, 0, 3, 1, 2], dtype=torch.int16)
    for one in (first, first.clone().requires_grad_(True)):
        assert torch.equal(placed(one, rest, order), order.float())


def test_an_order_that_names_no_place_is_an_error():
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            placed(torch.ones(1, 1), torch.ones(1, 2), torch.tensor([0, 1, wrong], dtype=torch.int16))


def test_places_learn():
    first, rest = examples.random(2, 3).requires_grad_(True), examples.random(2, 4).requires_grad_(True)
    order = torch.tensor([6, 0, 2, 1, 5, 4, 3], dtype=torch.int16)
    weights = torch.arange(1.0, 8.0)
    (placed(first, rest, order) * weights).sum().backward()
    expected = weights[order.long().argsort()]
    torch.testing.assert_close(torch.cat([first.grad, rest.grad], dim=1), expected.expand(2, 7))
