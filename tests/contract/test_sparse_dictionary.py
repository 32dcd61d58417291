"""What is particular to the sparse dictionary; the rest runs in test_formats.py."""

import copy
import shutil

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.formats import build, spec_bytes, stored_tensors
from lrcompress.formats.sparse_dictionary import SparseDictionary
from lrcompress.kernels.products import GATHER_ROWS
from lrcompress.linalg.packing import pack_bits, unpack_bits
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


def many_atoms(dtype: torch.dtype = torch.float32, **more: int):
    """A module with four atoms per coefficient, whose codes are multiplied sparse; and its weight and bias."""
    atoms, nonzeros = 16, 4
    generator = torch.Generator().manual_seed(0)
    support = torch.zeros(24, atoms, dtype=torch.bool)
    for row in range(24):
        support[row, torch.randperm(atoms, generator=generator)[:nonzeros]] = True
    dictionary, codes = torch.randn(atoms, 40, generator=generator), torch.randn(24, atoms, generator=generator)
    bias = torch.randn(24, generator=generator)
    spec = Spec("sparse_dictionary", (24, 40), True, True, parameters={"rank": nonzeros, "atoms": atoms, **more})
    module = loaded(spec, SparseDictionary.encode(spec, dictionary, codes * support, support, bias))
    return module.to(dtype), (codes * support) @ dictionary, bias


@pytest.mark.parametrize("rows", [1, GATHER_ROWS, 3 * GATHER_ROWS])
@pytest.mark.parametrize("bits", [{}, {"coefficient_bits": 8}, {"dictionary_bits": 8}])
def test_every_product_multiplies_by_the_weight(rows, bits):
    module, weight, bias = many_atoms(**bits)
    x = torch.randn(2, rows, 40, generator=torch.Generator().manual_seed(1))
    if bits:  # what eight bits err by is another test's
        weight = module.dense().detach()
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(module(x), x @ weight.T + bias, **tolerance)
        torch.testing.assert_close(module(x[0, 0]), x[0, 0] @ weight.T + bias, **tolerance)
    torch.testing.assert_close(module(x), x @ weight.T + bias, **tolerance)
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("bits", [{}, {"coefficient_bits": 8}])
def test_it_computes_with_what_it_holds_whatever_was_changed(rows, bits):
    module = many_atoms(**bits)[0]
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1))

    def right() -> bool:
        """Up to rounding: sums of 40 and 4 products on the one way, of 16 and 40 on the other, and a bias on both."""
        size = x.abs() @ (module.codes().abs() @ module.dictionary.abs()).T + module.bias.abs()
        off = (module(x) - (x @ module.dense().T + module.bias)).abs()
        return bool((off <= (40 + 4 + 1 + 16 + 40 + 1) * torch.finfo(x.dtype).eps / 2 * size).all())

    with torch.no_grad():
        assert right()
        (module.coefficients_scale if bits else module.coefficients).mul_(3)  # as an optimizer does
        assert right()
        module.positions.copy_(module.positions.flip(0))
        assert right()
        module.double()
        x = x.double()
        assert right()
        module.float()
        x = x.float()
        assert right()
    with torch.inference_mode():
        assert right()


def test_nothing_is_kept_beside_what_is_stored():
    """No tensor appears in a module that was used, so that its memory and its copies are what the files have."""
    module, _, _ = many_atoms()
    names, before = set(module.state_dict()), dict(vars(module))
    with torch.no_grad():
        found = module(torch.ones(1, 40))
        module(torch.ones(100, 40))
        assert set(module.state_dict()) == names
        assert vars(module).keys() == before.keys()
        twin = copy.deepcopy(module)
        assert torch.equal(twin(torch.ones(1, 40)), found)
        twin.coefficients.mul_(2)
        assert not torch.equal(twin(torch.ones(1, 40)), found)
        assert torch.equal(module(torch.ones(1, 40)), found)


def test_it_trains_after_it_was_used_and_computes_with_what_was_learnt():
    module, _, _ = many_atoms()
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = module(x)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    module(x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    optimizer.step()
    with torch.no_grad():
        after = module(x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, x @ module.dense().T + module.bias, rtol=1e-4, atol=1e-4)


def test_it_compiles():
    module, weight, bias = many_atoms()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(compiled(x), x @ weight.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_work_of_the_sparse_product():
    """Many rows in float32 multiply the coefficients only; few rows, or bfloat16, all that a decoded row has."""
    module, _, _ = many_atoms()
    (out, inputs), (atoms, nonzeros) = module.spec.shape, (module.spec.parameters["atoms"], module.spec.rank)
    assert module.multiply_adds(50) == atoms * inputs + out * nonzeros
    assert module.multiply_adds(1) == module.to(torch.bfloat16).multiply_adds(50) == atoms * inputs + out * atoms
    stored = atoms * inputs + out * nonzeros + out
    assert module.touched_bytes(50) == 2 * stored + out * atoms // 8 + 2 * 2 * out * atoms
    module.float()
    assert module.touched_bytes(50) == module.touched_bytes(1) == 4 * stored + out * atoms // 8
