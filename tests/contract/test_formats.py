"""One suite over every registered format."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrcompress.errors import InputError
from lrcompress.formats import FORMATS, build, spec_bytes, spec_numbers, stored_tensors
from lrcompress.formats.sparse_dictionary import SparseDictionary, pack_bits, unpack_bits
from lrcompress.linalg.dictionary import largest
from lrcompress.protocols import Spec

FACTORED = ["low_rank", "pivoted", "sparse_dictionary"]
SHAPES = [(24, 40), (40, 24), (24, 24)]


def parameters(name: str, shape: tuple[int, int], rank: object) -> dict[str, object]:
    if name != "sparse_dictionary":
        return {"rank": rank}
    return {"rank": rank, "atoms": min(2 * rank, shape[0]) if type(rank) is int and rank > 0 else 20}


def example(name: str, shape: tuple[int, int], rank: int, bias: bool, **more: int):
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(shape[0], generator=generator) if bias else None
    spec = Spec(name, shape, bias, bias, parameters={**parameters(name, shape, rank), **more})
    if name == "sparse_dictionary":
        atoms = spec.parameters["atoms"]
        dictionary = torch.randn(atoms, shape[1], generator=generator)
        support = largest(torch.rand(shape[0], atoms, generator=generator), rank)
        codes = torch.randn(shape[0], atoms, generator=generator) * support
        stored = SparseDictionary.encode(spec, dictionary, codes, support, values)
        return spec, stored, codes @ dictionary, values
    left = torch.randn(shape[0], rank, generator=generator)
    right = torch.randn(rank, shape[1], generator=generator)
    return spec, FORMATS.get(name).encode(left, right, values), left @ right, values


def loaded(spec: Spec, stored, dtype=torch.float32):
    module = build(spec, dtype)
    module.load_state_dict({**stored, "weight": torch.empty(0)}, strict=True)
    return module


def test_every_registered_format_is_in_this_suite():
    assert sorted(FACTORED) == FORMATS.names()


@pytest.mark.parametrize("name", FACTORED)
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


@pytest.mark.parametrize("name", FACTORED)
def test_factors_are_trainable_and_indices_are_buffers(name):
    spec, stored, _, _ = example(name, (24, 40), 5, True)
    module = loaded(spec, stored)
    module(torch.randn(3, 40)).sum().backward()
    assert all(p.grad is not None and p.is_floating_point() for p in module.parameters())
    assert not any(b.is_floating_point() and b.numel() for b in module.buffers())


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("rank", [0, -1, 25, 1.5, None, True, "3"])
def test_an_impossible_rank_is_refused_before_anything_is_allocated(name, rank):
    with pytest.raises(InputError, match="rank"):
        build(Spec(name, (24, 40), parameters=parameters(name, (24, 40), rank)), torch.float32)


@pytest.mark.parametrize("name", FACTORED)
def test_bfloat16_storage_costs_nothing_visible(name):
    """Rounding the factors to bfloat16 errs no more than rounding the dense matrix does, within a factor."""
    spec, stored, weight, _ = example(name, (256, 192), 96, False)
    rounded = {k: t.bfloat16().float() if t.is_floating_point() else t for k, t in stored.items()}
    error = (loaded(spec, rounded).dense() - weight).norm() / weight.norm()
    assert error < 4 * (weight.bfloat16().float() - weight).norm() / weight.norm()


def test_pivoted_is_never_larger_than_dense_and_smaller_than_low_rank():
    for rank in range(1, 192):
        pivoted = spec_numbers(Spec("pivoted", (256, 192), parameters={"rank": rank}))
        assert pivoted == rank * (256 + 192 - rank) + 256
        low_rank = spec_numbers(Spec("low_rank", (256, 192), parameters={"rank": rank}))
        assert low_rank == rank * (256 + 192)
        assert pivoted <= 256 * 192 + 256


def sparse(rank: int, atoms: int, **more: object) -> Spec:
    return Spec("sparse_dictionary", (24, 40), parameters={"rank": rank, "atoms": atoms, **more})


@pytest.mark.parametrize("atoms", [0, -1, 25, 1.5, None, True, "3", 10**9])
def test_an_impossible_dictionary_is_refused(atoms):
    with pytest.raises(InputError, match="atoms"):
        build(sparse(1, atoms), torch.float32)


def test_more_coefficients_than_atoms_and_unknown_bits_are_refused():
    with pytest.raises(InputError, match="rank"):
        build(sparse(11, 10), torch.float32)
    for key in ("coefficient_bits", "dictionary_bits"):
        with pytest.raises(InputError, match=key):
            build(sparse(5, 10, **{key: 4}), torch.float32)


def test_positions_are_stored_in_the_smaller_of_two_ways():
    for rank, atoms, kind in ((1, 24, torch.int16), (1, 16, torch.uint8), (2, 24, torch.uint8)):
        assert stored_tensors(sparse(rank, atoms), torch.bfloat16)["positions"].dtype == kind
    assert spec_bytes(sparse(1, 24), 2) == 24 * 40 * 2 + 24 * 2 + 24 * 2
    assert spec_bytes(sparse(3, 21), 2) == 21 * 40 * 2 + 24 * 3 * 2 + 24 * 21 // 8


@pytest.mark.parametrize(
    "bits", [{"coefficient_bits": 8}, {"dictionary_bits": 8}, {"coefficient_bits": 8, "dictionary_bits": 8}]
)
@pytest.mark.parametrize("rank", [1, 11])
def test_eight_bits_are_counted_and_near(bits, rank):
    spec, stored, weight, values = example("sparse_dictionary", (24, 40), rank, True, **bits)
    module = loaded(spec, stored)
    assert (module.dense() - weight).norm() < 0.02 * weight.norm()
    layout = stored_tensors(spec, torch.bfloat16)
    assert spec_bytes(spec, 2) == sum(t.numel() * t.itemsize for t in layout.values())
    if rank > 1:  # otherwise the scales cost more than is saved
        assert spec_bytes(spec, 2) < spec_bytes(example("sparse_dictionary", (24, 40), rank, True)[0], 2)
    x = torch.randn(3, 40)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(module(x), x @ module.dense().T + values, rtol=1e-4, atol=1e-4)


def test_eight_bits_mean_the_same_in_bfloat16():
    """Scales are exact in bfloat16, so codes stored beside them are multiplied by what they were divided by."""
    bits = {"coefficient_bits": 8, "dictionary_bits": 8}
    stored = example("sparse_dictionary", (24, 40), 7, False, **bits)[1]
    for key in ("coefficients_scale", "dictionary_scale"):
        assert torch.equal(stored[key], stored[key].bfloat16().float())


def test_packed_bits_come_back():
    for shape in ((3, 5), (8, 8), (1, 1), (7, 9)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.5
        packed = pack_bits(mask)
        assert packed.dtype == torch.uint8
        assert len(packed) == -(-mask.numel() // 8)
        assert torch.equal(unpack_bits(packed, *shape), mask)
