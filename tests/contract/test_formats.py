"""One suite over every registered format."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrcompress.errors import InputError
from lrcompress.formats import FORMATS, build, possible_places, spec_bytes, spec_numbers, stored_tensors
from lrcompress.formats.coded import Coded, Scales
from lrcompress.formats.quantized import Quantized
from lrcompress.formats.semi_sparse import SemiSparse, top_two
from lrcompress.formats.sparse_dictionary import SparseDictionary
from lrcompress.formats.sum import rounded_factors
from lrcompress.formats.transposed_dictionary import TransposedDictionary
from lrcompress.linalg.dictionary import largest
from lrcompress.linalg.packing import UNITS, pack, packed_length, unpack
from lrcompress.model.device import resolve_device
from lrcompress.protocols import Spec
from tests.products import multiply_adds

FACTORED = ["low_rank", "pivoted"]
DICTIONARY = "sparse_dictionary"
TRANSPOSED = "transposed_dictionary"
BASES = ["quantized", "semi_sparse"]
SUMS = ["sum 16 of quantized", "sum 8 of quantized", "sum 4 of semi_sparse"]
CODED = "coded"
ALL = [*FACTORED, *BASES, *SUMS, DICTIONARY, TRANSPOSED, CODED]
SHAPES = [(24, 40), (40, 24), (24, 24)]
BITS = {1: (8, 5), 5: (4, 7), 11: (3, 7), 23: (2, 64), 96: (3, 64)}
"""Bits and group of the example that stands for a rank."""


def dictionary_example(shape: tuple[int, int], rank: int, bias: bool, **more: int):
    """A dictionary of twice as many atoms as every output has coefficients, where there are so many outputs."""
    generator = torch.Generator().manual_seed(rank)
    atoms = min(2 * rank, shape[0])
    values = torch.randn(shape[0], generator=generator) if bias else None
    spec = Spec(DICTIONARY, shape, bias, bias, parameters={"rank": rank, "atoms": atoms, **more})
    dictionary = torch.randn(atoms, shape[1], generator=generator)
    support = largest(torch.rand(shape[0], atoms, generator=generator), rank)
    codes = torch.randn(shape[0], atoms, generator=generator) * support
    return spec, SparseDictionary.encode(spec, dictionary, codes, support, values), codes @ dictionary, values


def transposed_example(shape: tuple[int, int], rank: int, bias: bool):
    """The dictionary of the transposed weight."""
    generator = torch.Generator().manual_seed(rank)
    atoms = min(2 * rank, shape[1])
    values = torch.randn(shape[0], generator=generator) if bias else None
    spec = Spec(TRANSPOSED, shape, bias, bias, parameters={"rank": rank, "atoms": atoms})
    dictionary = torch.randn(atoms, shape[0], generator=generator)
    support = largest(torch.rand(shape[1], atoms, generator=generator), rank)
    codes = torch.randn(shape[1], atoms, generator=generator) * support
    stored = TransposedDictionary.encode(spec, dictionary, codes, support, values)
    return spec, stored, dictionary.T @ codes.T, values


def example(name: str, shape: tuple[int, int], rank: int, bias: bool):
    """Spec, stored tensors, weight and bias of an example in a format; `rank` picks its size."""
    if name == DICTIONARY:
        return dictionary_example(shape, rank, bias)
    if name == TRANSPOSED:
        return transposed_example(shape, rank, bias)
    if name == CODED:
        return coded_example(shape, rank, bias)
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, shape[1], generator=generator)
    values = torch.randn(shape[0], generator=generator) if bias else None
    if name in FACTORED:
        spec = Spec(name, shape, bias, bias, parameters={"rank": rank})
        return spec, FORMATS.get(name).encode(left, right, values), left @ right, values
    parameters, stored, weight = base_example(name.split()[-1], shape, rank, generator)
    form = name.split()[0]
    if form == "sum":
        bits, base = int(name.split()[1]), {"format": name.split()[-1], **parameters}
        parameters = {"base": base, "correction": {"format": "low_rank", "rank": rank, "bits": bits}}
        rounded_left, rounded_right = rounded_factors(left, right, bits)
        weight = weight + (rounded_left @ rounded_right).float()
        stored = FORMATS.get(form).encode(stored, left, right, bits, values)
    elif bias:
        stored = {**stored, "bias": values}
    return Spec(form, shape, bias, bias, parameters=parameters), stored, weight, values


def coded_example(shape: tuple[int, int], rank: int, bias: bool):
    """Codes of about `rank` in size and scales over some octaves, which lie where the grid has them to 1 / 510."""
    generator = torch.Generator().manual_seed(rank)
    codes = (rank * torch.randn(shape, generator=generator)).round().int()
    rows, columns = (torch.exp2(torch.linspace(-2, 1, size)) for size in shape)
    values = torch.randn(shape[0], generator=generator) if bias else None
    scales = Scales.nearest(rows, columns)
    assert float((scales.rows / rows).log2().abs().max()) <= 3 / 510 + 1e-6
    stored = Coded.encode(codes, scales, values)
    weight = torch.tensor([[float(code) for code in row] for row in codes.tolist()])
    weight *= scales.rows[:, None] * scales.columns
    return Spec(CODED, shape, bias, bias, parameters={"length": len(stored["stream"])}), stored, weight, values


def base_example(name: str, shape: tuple[int, int], rank: int, generator: torch.Generator):
    """Parameters, stored tensors and weight of a base, made entry by entry."""
    if name == "semi_sparse":
        weight = torch.randn(shape, generator=generator)
        mask = torch.zeros(shape, dtype=torch.bool)
        for row in range(shape[0]):
            for start in range(0, shape[1], 4):
                kept = torch.randperm(min(4, shape[1] - start), generator=generator)[:2] + start
                mask[row, kept] = True
        return {"pattern": "2:4"}, SemiSparse.encode(weight, mask, None), weight * mask
    bits, group = BITS[rank]
    groups = -(-shape[1] // group)
    codes = torch.randint(2**bits, shape, generator=generator)
    zeros = torch.randint(2**bits, (shape[0], groups), generator=generator)
    scale = torch.rand(shape[0], groups, generator=generator).bfloat16().float()
    weight = torch.empty(shape)
    for column in range(shape[1]):
        weight[:, column] = (codes[:, column] - zeros[:, column // group]) * scale[:, column // group]
    # A group wider than the row is the whole row.
    return {"bits": bits, "group": group}, Quantized.encode(codes, scale, zeros, bits, None), weight


def loaded(spec: Spec, stored, dtype=torch.float32):
    module = build(spec, dtype)
    module.load_state_dict({**stored, "weight": torch.empty(0)}, strict=True)
    return module


def test_every_registered_format_is_in_this_suite():
    others = ["table", "ggml"]  # of embeddings, see tests/test_embeddings.py; of whole blocks, see tests/ggml
    assert sorted([*{name.split()[0] for name in ALL}, *others]) == FORMATS.names()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 11, 23])
class TestFormat:
    def test_dense_is_the_matrix(self, name, shape, bias, rank):
        spec, stored, weight, values = example(name, shape, rank, bias)
        module = loaded(spec, stored)
        torch.testing.assert_close(module.dense(), weight, rtol=1e-3, atol=1e-4)
        if bias:
            torch.testing.assert_close(module.dense_bias(), values, rtol=1e-3, atol=1e-4)
        else:
            assert module.dense_bias() is None

    def test_forward_multiplies_by_it(self, name, shape, bias, rank):
        spec, stored, weight, values = example(name, shape, rank, bias)
        x = torch.randn(2, 5, shape[1], generator=torch.Generator().manual_seed(1))
        expected = x @ weight.T + (values if bias else 0)
        torch.testing.assert_close(loaded(spec, stored)(x), expected, rtol=1e-3, atol=1e-3)

    def test_bytes_are_those_of_the_file(self, name, shape, bias, rank, tmp_path):
        spec, stored, _, _ = example(name, shape, rank, bias)
        tensors = {k: t.bfloat16() if t.is_floating_point() else t for k, t in stored.items()}
        save_file({**tensors, "weight": torch.empty(0, dtype=torch.bfloat16)}, tmp_path / "f.safetensors")
        on_disk = load_file(tmp_path / "f.safetensors")
        assert spec_bytes(spec, 2) == sum(t.numel() * t.itemsize for t in on_disk.values())
        assert spec_numbers(spec) == sum(t.numel() for t in on_disk.values())

    def test_the_layout_is_known_beforehand(self, name, shape, bias, rank):
        spec, stored, _, _ = example(name, shape, rank, bias)
        layout = stored_tensors(spec, torch.float32)
        assert {k: (t.shape, t.dtype) for k, t in layout.items() if k != "weight"} == {
            k: (t.shape, t.dtype) for k, t in stored.items()
        }
        assert layout["weight"].numel() == 0

    def test_the_spec_survives_json(self, name, shape, bias, rank):
        spec = example(name, shape, rank, bias)[0]
        assert Spec.from_json("x", spec.as_json()) == spec


@pytest.mark.parametrize("name", ALL)
def test_factors_are_trainable_and_indices_are_buffers(name):
    spec, stored, _, _ = example(name, (24, 40), 5, True)
    module = loaded(spec, stored)
    module(torch.randn(3, 40)).sum().backward()
    assert all(p.grad is not None and p.is_floating_point() for p in module.parameters())
    assert not any(b.is_floating_point() and b.numel() for b in module.buffers())


@pytest.mark.parametrize("name", [*FACTORED, DICTIONARY, TRANSPOSED])
@pytest.mark.parametrize("rank", [0, -1, "too high", 1.5, None, True, "3"])
def test_an_impossible_rank_is_refused_before_anything_is_allocated(name, rank):
    if rank == "too high":  # of low rank: a right factor that others share may have more rows than this weight
        rank = 41 if name == "low_rank" else 25
    with pytest.raises(InputError, match="rank"):
        build(Spec(name, (24, 40), parameters={"rank": rank, "atoms": 20}), torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_storage_costs_nothing_visible(name):
    """Rounding the factors to bfloat16 errs no more than rounding the dense matrix does, within a factor."""
    spec, stored, weight, _ = example(name, (256, 192), 96, False)
    rounded = {k: t.bfloat16().float() if t.is_floating_point() else t for k, t in stored.items()}
    error = (loaded(spec, rounded).dense() - weight).norm() / weight.norm()
    assert error < 4 * (weight.bfloat16().float() - weight).norm() / weight.norm()


@pytest.mark.device
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_format_multiplies_on_this_machines_device(name, rows, dtype):
    """Loaded there as transformers loads it; against float64 on the CPU."""
    device = resolve_device("auto")
    spec, stored, _, values = example(name, (40, 24), 11, True)
    module = loaded(spec, stored, dtype).to(dtype).to(device)
    module.lay_out()
    x = torch.randn(2, rows, 24, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    weight, bias = module.dense().double(), module.dense_bias().double()
    exact, size = x.double() @ weight.T + bias, x.double().abs() @ weight.abs().T + values.abs().max()
    assert bool(((module(x).double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size.max()).all())


@pytest.mark.parametrize("name", [*BASES, *FACTORED, "sum 8 of quantized", DICTIONARY, TRANSPOSED])
def test_tracing_sees_through_products_with_what_is_stored(name):
    """torch.compile in one graph, and torch.export for any number of rows; frozen, as PEFT leaves them, with gradients."""
    spec, stored, _, _ = example(name, (24, 40), 5, True)
    module = loaded(spec, stored).requires_grad_(False)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    expected = module(x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    given = x.clone().requires_grad_(True)
    compiled(given).sum().backward()
    torch.testing.assert_close(given.grad, module.dense().sum(0).expand_as(x), rtol=1e-4, atol=1e-3)
    exported = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    assert any("lrcompress" in str(node.target) for node in exported.graph.nodes)
    longer = torch.cat([x, x, x], dim=1)
    torch.testing.assert_close(exported.module()(longer), module(longer))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_laying_out_moves_no_number(name, dtype):
    spec, stored, _, _ = example(name, (40, 24), 11, True)
    module = loaded(spec, stored, dtype)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, expected = {k: t.clone() for k, t in module.state_dict().items()}, module(x)
    module.lay_out()
    assert all(torch.equal(before[k], t) for k, t in module.state_dict().items())
    rounding = 2 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(module(x), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("laid_out", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_autocast_says_what_is_multiplied_in(name, trained, laid_out):
    """As of nn.Linear: training in bfloat16 would otherwise pay for products in float32."""
    spec, stored, _, values = example(name, (24, 40), 5, True)
    module = loaded(spec, stored).requires_grad_(trained)
    if laid_out:
        module.lay_out()
    x = torch.randn(2, 20, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    exact = x.detach() @ module.dense().detach().T + values
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_an_input_that_does_not_fit_is_refused(name, dtype, rows, grad):
    """Too wide, too narrow, on another device: compiled code would read what is not there."""
    spec, stored, _, _ = example(name, (24, 40), 5, True)
    module = loaded(spec, stored, dtype)
    module.lay_out()
    with torch.set_grad_enabled(grad):
        for width in (0, 32, 39, 41, 100):
            with pytest.raises(RuntimeError):
                module(torch.randn(rows, width, dtype=dtype))
        x = torch.randn(rows, 40, dtype=dtype)
        with torch.device("meta"):  # where tensors are made, not where these are
            assert module(x).device.type == "cpu"
        with pytest.raises((RuntimeError, NotImplementedError)):
            module.to("meta")(x)


@pytest.mark.parametrize("name", ALL)
def test_an_output_may_be_changed_in_place(name):
    """As OLMo clips those of its projections."""
    spec, stored, _, _ = example(name, (24, 40), 5, False)
    module = loaded(spec, stored).requires_grad_(False)
    module.lay_out()
    x = torch.randn(2, 20, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = module(x)
    y.clamp_(-1, 1)
    y.sum().backward()
    inside = (module(x).detach().abs() < 1).float()
    torch.testing.assert_close(x.grad, inside @ module.dense(), rtol=1e-4, atol=1e-3)


def test_autocast_leaves_float64():
    spec, stored, _, _ = example("quantized", (24, 40), 5, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert loaded(spec, stored, torch.float64)(torch.randn(3, 40, dtype=torch.float64)).dtype == torch.float64


def test_pivoted_is_never_larger_than_dense_and_smaller_than_low_rank():
    for rank in range(1, 192):
        pivoted = spec_numbers(Spec("pivoted", (256, 192), parameters={"rank": rank}))
        assert pivoted == rank * (256 + 192 - rank) + 256
        low_rank = spec_numbers(Spec("low_rank", (256, 192), parameters={"rank": rank}))
        assert low_rank == rank * (256 + 192)
        assert pivoted <= 256 * 192 + 256


@pytest.mark.parametrize("bits", sorted(UNITS))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 41])
def test_packed_codes_come_back(bits, count):
    codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(count))
    packed = pack(codes, bits)
    assert packed.shape == (3, packed_length(count, bits))
    assert 8 * packed.shape[1] < bits * count + 8 * 3
    assert torch.equal(unpack(packed, bits, count).long(), codes)


def test_three_bits_are_laid_out_as_documented():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])
    word = sum(int(code) << (3 * i) for i, code in enumerate(codes[0]))
    assert pack(codes, 3).tolist() == [list(word.to_bytes(3, "little"))]


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 6, 7, 8])
def test_semi_sparse_of_any_width(columns):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    mask = top_two(weight.abs())
    for start in range(0, columns, 4):
        assert (mask[:, start : start + 4].sum(1) == min(2, columns - start)).all()
    module = loaded(
        Spec("semi_sparse", (5, columns), parameters={"pattern": "2:4"}), SemiSparse.encode(weight, mask, None)
    )
    assert torch.equal(module.dense(), weight * mask)


def test_bits_of_a_weight():
    """What the formats cost in bfloat16: 3 bits in groups of 64 and 2:4, everything counted."""
    shape = (256, 1536)
    quantized = spec_bytes(Spec("quantized", shape, parameters={"bits": 3, "group": 64}), 2)
    assert 8 * quantized / (256 * 1536) == pytest.approx(3 + 16 / 64 + 3 / 64)
    assert 8 * spec_bytes(Spec("semi_sparse", shape, parameters={"pattern": "2:4"}), 2) / (256 * 1536) == 9


GOOD = {
    "base": {"format": "quantized", "bits": 3, "group": 8},
    "correction": {"format": "low_rank", "rank": 3, "bits": 8},
}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("quantized", {"bits": 5, "group": 64}, "5 bits"),
        ("quantized", {"bits": True, "group": 64}, "bits"),
        ("quantized", {"bits": 4, "group": 0}, "groups of 0"),
        ("quantized", {"bits": 4}, "groups of None"),
        ("semi_sparse", {"pattern": "4:8"}, "4:8"),
        ("semi_sparse", {}, "pattern"),
        ("coded", {}, "stream of None"),
        ("coded", {"length": True}, "stream of True"),
        ("coded", {"length": 2**40}, "stream of"),
        ("sum", {}, "base"),
        ("sum", {"base": "rtn", "correction": {}}, "base"),
        ("sum", {**GOOD, "base": {"format": "x"}}, "unknown format"),
        ("sum", {**GOOD, "base": {"format": "sum", **GOOD}}, "sum of sum"),
        ("sum", {**GOOD, "base": {"format": "quantized", "bits": 3}}, "groups of None"),
        ("sum", {**GOOD, "correction": {"format": "pivoted", "rank": 3}}, "its correction is low_rank"),
        ("sum", {**GOOD, "correction": {"format": "low_rank", "rank": 25, "bits": 8}}, "rank 25"),
        ("sum", {**GOOD, "correction": {"format": "low_rank", "rank": 3, "bits": 7}}, "7 bits"),
    ],
)
def test_impossible_parameters_are_refused_before_anything_is_allocated(name, parameters, message):
    with pytest.raises(InputError, match=message):
        build(Spec(name, (24, 40), parameters=parameters), torch.float32)


def test_a_sum_has_one_tensor_under_the_dense_parameter_name():
    names = stored_tensors(Spec("sum", (24, 40), parameters=GOOD), torch.bfloat16)
    assert [n for n in names if n.rpartition(".")[2] == "weight"] == ["weight"]


@pytest.mark.parametrize("bits", [8, 4])
def test_low_bit_factors_round_the_correction_only(bits):
    """The rounded correction is near the exact one: about 1 % at 8 bits, a fifth at 4."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 8, generator=generator), torch.randn(8, 96, generator=generator)
    rounded_left, rounded_right = rounded_factors(left, right, bits)
    error = (rounded_left @ rounded_right - left @ right).norm() / (left @ right).norm()
    assert error < {8: 0.012, 4: 0.2}[bits]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1, 40])
@torch.no_grad()
def test_multiply_adds_are_those_that_torch_counts(name, rows):
    spec, stored, _, _ = example(name, (24, 40), 5, False)
    module = loaded(spec, stored)
    module.lay_out()
    x = torch.randn(rows, 40)
    assert module.multiply_adds(rows) * rows == multiply_adds(lambda: module(x))


def decoded(numbers: int) -> int:
    """Bytes of numbers in bfloat16 that are written and read again."""
    return 2 * 2 * numbers


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("low_rank", 2 * 5 * (24 + 40)),
        ("pivoted", 2 * 5 * (24 + 40 - 5) + 2 * 24),  # the order in 16 bits
        ("quantized", 24 * 20 + 24 * 3 + 2 * 24 * 6 + decoded(24 * 40)),  # groups of 7 are decoded
        ("semi_sparse", 2 * 24 * 20 + 24 * 5),  # values, places
        ("sum 16 of quantized", 24 * 20 + 24 * 3 + 2 * 24 * 6 + decoded(24 * 40) + 2 * 5 * (24 + 40)),
        ("sum 8 of quantized", 24 * 20 + 24 * 3 + 2 * 24 * 6 + decoded(24 * 40) + 5 * (24 + 40) + 2 * 5),
        ("sparse_dictionary", 2 * 10 * 40 + 2 * 24 * 5 + 24 * 10 // 8),  # atoms, coefficients, a mask
        ("transposed_dictionary", 2 * 10 * 24 + 2 * 40 * 5 + 40 * 10 // 8),
        # codes, also as numbers, scales, the points of their grids
        ("coded", 24 * 40 * 5 + 16 + 24 + 40 + 4 * 2 * 256),
    ],
)
def test_touched_bytes_in_bfloat16(name, moved):
    spec, stored, _, _ = example(name, (24, 40), 5, False)
    assert loaded(spec, stored).to(torch.bfloat16).touched_bytes(1) == moved
    biased, stored, _, _ = example(name, (24, 40), 5, True)
    assert loaded(biased, stored).to(torch.bfloat16).touched_bytes(1) == moved + 2 * 24


@pytest.mark.parametrize("dimensions", [(40,), (3, 40), (2, 3, 40), (0, 40)])
def test_pivoted_of_any_dimensions(dimensions):
    spec, stored, weight, _ = example("pivoted", (24, 40), 5, False)
    x = torch.randn(dimensions, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(spec, stored)(x), x @ weight.T, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_pivoted_follows_its_order_when_it_changes():
    spec, stored, weight, _ = example("pivoted", (24, 40), 5, False)
    module, x = loaded(spec, stored), torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    before = module(x)
    module.order.copy_(torch.arange(24))
    torch.testing.assert_close(module(x)[..., stored["order"].long()], before)
    assert module.touched_bytes(1) == 4 * 5 * (24 + 40 - 5), "an order that moves nothing is not applied"
    module.load_state_dict({**stored, "weight": torch.empty(0)})
    torch.testing.assert_close(module(x), before)
    module.order = torch.arange(24, dtype=torch.int16)
    torch.testing.assert_close(module(x)[..., stored["order"].long()], before)
    module.order = stored["order"]
    for same in (copy.deepcopy(module), module.to(torch.float64).to(torch.float32)):
        torch.testing.assert_close(same(x), x @ weight.T, rtol=1e-3, atol=1e-3)
    assert set(module.state_dict()) == {*stored, "weight"}


@pytest.mark.parametrize("name", FACTORED)
def test_factors_compile(name):
    spec, stored, weight, _ = example(name, (24, 40), 5, False)
    compiled = torch.compile(loaded(spec, stored), backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(compiled(x), x @ weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "features"), [(1, 16), (1, 17), (4, 48), (5, 48), (1, 160)])
@torch.no_grad()
def test_codes_multiply_as_integers_and_as_numbers_alike(dtype, rows, features):
    """torch's int8 product, where it is taken, against float64: to what the dtype's own product may err."""
    spec, stored, _, values = coded_example((24, features), 5, True)
    module = loaded(spec, stored, dtype).to(dtype)
    module.lay_out()
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ module.dense().double().T + values.to(dtype).double()
    size = (x.double().abs() @ module.dense().double().abs().T + values.double().abs()).max()
    assert float((module(x).double() - exact).abs().max()) < 4 * torch.finfo(dtype).eps * float(size)


def test_only_what_is_shared_is_looked_for_at_its_owner():
    """A damaged file that lacks another tensor must not get the owner's in its place."""
    assert possible_places("A.weight", "a.", "b.") == ["a.A.weight", "b.A.weight", "b.pivot.weight"]
    assert possible_places("dictionary_scale", "a.", "b.") == ["a.dictionary_scale", "b.dictionary_scale"]
    for own in ("B.weight", "rest.weight", "coefficients", "positions", "order"):
        assert possible_places(own, "a.", "b.") == [f"a.{own}"]
