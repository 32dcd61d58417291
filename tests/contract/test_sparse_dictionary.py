"""What is particular to the sparse dictionary; the rest runs in test_formats.py."""

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.formats import build, spec_bytes, stored_tensors
from lrcompress.formats.sparse_dictionary import pack_bits, unpack_bits
from lrcompress.protocols import Spec
from tests.contract.test_formats import dictionary_example, loaded


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
    spec, stored, weight, values = dictionary_example((24, 40), rank, True, **bits)
    module = loaded(spec, stored)
    assert (module.dense() - weight).norm() < 0.02 * weight.norm()
    layout = stored_tensors(spec, torch.bfloat16)
    assert spec_bytes(spec, 2) == sum(t.numel() * t.itemsize for t in layout.values())
    if rank > 1:  # otherwise the scales cost more than is saved
        assert spec_bytes(spec, 2) < spec_bytes(dictionary_example((24, 40), rank, True)[0], 2)
    x = torch.randn(3, 40)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(module(x), x @ module.dense().T + values, rtol=1e-4, atol=1e-4)


def test_eight_bits_mean_the_same_in_bfloat16():
    """Scales are exact in bfloat16, so codes stored beside them are multiplied by what they were divided by."""
    bits = {"coefficient_bits": 8, "dictionary_bits": 8}
    stored = dictionary_example((24, 40), 7, False, **bits)[1]
    for key in ("coefficients_scale", "dictionary_scale"):
        assert torch.equal(stored[key], stored[key].bfloat16().float())


def test_packed_bits_come_back():
    for shape in ((3, 5), (8, 8), (1, 1), (7, 9)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.5
        packed = pack_bits(mask)
        assert packed.dtype == torch.uint8
        assert len(packed) == -(-mask.numel() // 8)
        assert torch.equal(unpack_bits(packed, *shape), mask)
