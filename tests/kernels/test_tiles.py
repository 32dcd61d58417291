"""Codes in tiles of their own width: what comes back, what is multiplied, on every kind of processor."""

import copy
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrcompress.kernels import panels, tiled_products, tiles
from lrcompress.kernels.native import FLAGS, library
from tests.commands import run_code

SHAPES = [(1, 1), (16, 32), (17, 33), (5, 100), (1040, 3), (2050, 70)]
PROCESSORS = {"plain": (), "avx2": ("-mavx2", "-mfma"), "avx512": ("-mavx512f", "-mfma")}
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def example(shape: tuple[int, int], size: float = 3.0, dtype: torch.dtype = torch.int16):
    """Codes whose sizes vary over octaves, some of them far out, levels and indices of scales, the weight in float64."""
    g = torch.Generator().manual_seed(shape[0] + shape[1])
    energies = [torch.exp2(torch.randn(n, generator=g)) for n in shape]
    codes = (size * torch.randn(shape, generator=g) * energies[0][:, None] * energies[1]).round()
    if dtype != torch.int8:
        codes[0, 0], codes[-1, -1], codes[shape[0] // 2, shape[1] // 2] = 32767, -32768, 1245
    if dtype == torch.int32:
        codes[0, shape[1] // 2], codes[shape[0] // 2, 0] = 1 << 24, -41120
    codes = codes.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)
    levels = torch.exp2(torch.rand(2, 256, generator=g) * 4 - 2)
    indices = torch.randint(256, (sum(shape),), generator=g, dtype=torch.uint8)
    rows, columns = indices.long().split(shape)
    weight = codes.double() * levels[0, rows].double()[:, None] * levels[1, columns].double()
    return codes, levels.view(torch.int32), indices, weight


def packed(codes: Tensor) -> tiles.Tiles:
    sizes = codes.abs().float()
    found = tiles.pack(codes.shape, (sizes.mean(1), sizes.mean(0)), lambda rows: codes[rows])
    assert found is not None
    return found


def assert_product(found: Tensor, x: Tensor, weight: Tensor):
    """Within what rounding to the dtype, and sums in float32, may be."""
    exact, sizes = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    eps = max(torch.finfo(x.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    assert float(((found.double() - exact).abs() / sizes.amax().clamp_min(1e-30)).max()) <= 2 * eps


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_every_code_comes_back_both_ways(shape, dtype, monkeypatch):
    codes, levels, indices, weight = example(shape, dtype=dtype)
    held = packed(codes)
    assert torch.equal(tiles.codes(held), codes.int())
    assert torch.equal(tiles._plain_codes(held), codes.int())
    torch.testing.assert_close(tiles.dense(held, levels, indices, torch.float32), weight.float())
    some = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    torch.testing.assert_close(tiles.rows_of(some, held, levels, indices, torch.float32), weight[some].float())
    monkeypatch.setattr(tiles, "library", lambda name: None)
    torch.testing.assert_close(tiles.dense(held, levels, indices, torch.float32), weight.float())
    torch.testing.assert_close(tiles.rows_of(some, held, levels, indices, torch.float64), weight[some])


@needs_compiler
@pytest.mark.parametrize("size", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 12.0, 25.0, 100.0, 3000.0, 100_000.0])
def test_every_width_comes_back(size):
    codes = (size * torch.randn(64, 96, generator=torch.Generator().manual_seed(1))).round().int()
    held = packed(codes)
    assert torch.equal(tiles.codes(held), codes.int())
    assert torch.equal(tiles._plain_codes(held), codes.int())


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "fast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False),
     (torch.float64, False)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [0, 1, 2, tiles.FEW, tiles.FEW + 1, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_weight(shape, rows, dtype, fast, monkeypatch):
    """fast: compiled code multiplies panels of bfloat16, not torch."""
    monkeypatch.setattr(panels, "fast", lambda: fast)
    codes, levels, indices, weight = example(shape, dtype=torch.int8)
    held = packed(codes)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    found = tiled_products.linear(x[None], held, levels, indices)
    assert (found.dtype, found.shape) == (dtype, (1, rows, shape[0]))
    if rows:
        assert_product(found[0], x, weight)


@needs_compiler
@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors_multiply_alike(processor, tmp_path, monkeypatch):
    """The same C for older processors; what this machine cannot run is left out."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not all(flag[2:] in flags for flag in PROCESSORS[processor]):
        pytest.skip("another processor")
    made = tmp_path / "tiles.so"
    source = Path(tiles.__file__).with_name("tiles.c")
    subprocess.run(["cc", *FLAGS, "-shared", *PROCESSORS[processor], source, "-o", made], check=True)
    codes, levels, indices, weight = example((100, 70))
    expected = packed(codes)
    monkeypatch.setattr(tiles, "library", lambda name: ctypes.CDLL(str(made)))
    held = packed(codes)
    assert all(map(torch.equal, held, expected))
    assert torch.equal(tiles.codes(held), codes.int())
    for rows in (1, 3, 40):
        x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(0))
        assert_product(tiled_products.linear(x, held, levels, indices), x, weight)
        assert_product(tiled_products.linear(x.bfloat16(), held, levels, indices), x.bfloat16(), weight)


@needs_compiler
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_panels_multiply_alike_whatever_torch_computes_with(capability):
    """torch's own products take part where there are many rows."""
    code = """
import torch
from tests.kernels.test_tiles import assert_product, example, packed
from lrcompress.kernels import tiled_products, tiles
codes, levels, indices, weight = example((100, 70), dtype=torch.int8)
held = packed(codes)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows in (1, 40):
        x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert_product(tiled_products.linear(x, held, levels, indices), x, weight)
"""
    done = run_code(code, environment={"ATEN_CPU_CAPABILITY": capability})
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("shape", [(30, 50), (33, 160)])
def test_gradients_are_those_of_the_product(shape, rows, dtype, native, monkeypatch):
    """Of the input and of what multiplies the scales, by autograd in float64."""
    codes, levels, indices, weight = example(shape, dtype=torch.int8)
    held = packed(codes)
    if not native:
        monkeypatch.setattr(tiles, "library", lambda name: None)
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(2, rows, size, generator=generator) for size in (shape[1], shape[0]))
    rows_by, columns_by = (0.5 + torch.rand(size, generator=generator) for size in shape)
    asked = [tensor.clone().requires_grad_(True) for tensor in (x, rows_by, columns_by)]
    found = tiled_products.linear(asked[0].to(dtype), held, levels, indices, (asked[1], asked[2]))
    assert found.dtype == dtype
    found.backward(gradient.to(dtype))
    exact = [tensor.double().requires_grad_(True) for tensor in (x, rows_by, columns_by)]
    wanted = exact[0] @ (exact[1][:, None] * weight * exact[2]).T
    wanted.backward(gradient.double())
    for ours, theirs in zip([found, *(t.grad for t in asked)], [wanted, *(t.grad for t in exact)], strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < (0.02 if dtype == torch.bfloat16 else 1e-5)  # bfloat16 rounds to 8 bits, four times on the way


@needs_compiler
def test_compiled_and_exported_programs_call_the_kernel():
    codes, levels, indices, weight = example((30, 50), dtype=torch.int8)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = packed(codes)
            for name, tensor in self.held._asdict().items():
                self.register_buffer(name, tensor)

        def forward(self, x):
            return tiled_products.linear(
                2 * x, tiles.Tiles(*(getattr(self, n) for n in tiles.Tiles._fields)), levels, indices
            )

    x = torch.randn(3, 50)
    exported = torch.export.export(Layer(), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert "tiles_linear" in exported.graph_module.code
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    for rows in (3, 20):
        x = torch.randn(rows, 50)
        assert_product(compiled(x), 2 * x, weight)
        assert_product(exported.module()(x), 2 * x, weight)
    arguments = (x, *packed(codes), levels, indices)
    gains = [torch.rand(size, requires_grad=True) for size in (30, 50)]
    torch.library.opcheck(torch.ops.lrcompress.tiles_linear.default, (*arguments, None, None))
    torch.library.opcheck(torch.ops.lrcompress.tiles_linear.default, (x.requires_grad_(), *arguments[1:], *gains))
    torch.library.opcheck(torch.ops.lrcompress.tiles_dense.default, (*arguments[1:], torch.float32))
    torch.library.opcheck(torch.ops.lrcompress.tiles_rows.default, (torch.tensor([3]), *arguments[1:], torch.float32))


@needs_compiler
def test_a_tile_is_as_wide_as_its_codes_need_and_three_bits_take_less_than_four():
    """Laplacian codes of 3 bits' entropy whose rows and columns differ by octaves."""
    g = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.randn(1024, 1, generator=g) * 0.8) * torch.exp2(torch.randn(1, 1024, generator=g) * 0.8)
    u = torch.rand(1024, 1024, generator=g) - 0.5
    codes = (1.5 * scale * -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.49999))).round().to(torch.int16)
    counts = codes.flatten().unique(return_counts=True)[1].double() / codes.numel()
    held = packed(codes)
    bits = 8 * sum(t.numel() * t.itemsize for t in held) / codes.numel()
    assert bits < float(-(counts * counts.log2()).sum()) + 0.9
    assert set(held.head[..., 0].unique().tolist()) > {2, 3, 4}
    assert 16 * held.head[..., 0].long().sum() == held.tiles.numel()


@needs_compiler
def test_a_row_that_is_not_there_is_refused():
    codes, levels, indices, _ = example((30, 50))
    held = packed(codes)
    for wrong in (30, -1):
        with pytest.raises(IndexError, match="beyond the 30"):
            tiles.rows_of(torch.tensor([wrong]), held, levels, indices, torch.float32)


@pytest.mark.parametrize("why", ["no compiler", "long rows"])
def test_where_there_can_be_no_tiles(why, monkeypatch):
    codes = torch.ones(2, 3, dtype=torch.int8)
    if why == "no compiler":
        monkeypatch.setattr(tiles, "library", lambda name: None)
    if why == "long rows":
        monkeypatch.setattr(tiles, "MOST_COLUMNS", 2)
    assert tiles.pack((2, 3), (torch.ones(2), torch.ones(3)), lambda rows: codes[rows]) is None


def test_the_library_is_there_where_a_compiler_is():
    assert (library("tiles") is None) == (shutil.which("cc") is None)


@needs_compiler
def test_copies_and_casts_keep_the_scales():
    _, levels, _, _ = example((4, 4))
    moved = torch.nn.Module()
    moved.register_buffer("levels", levels)
    assert torch.equal(copy.deepcopy(moved).to(torch.bfloat16).levels, levels)
