"""What is particular to the sparse dictionary; the rest runs in test_formats.py."""

import copy
import pickle
from unittest import mock

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.formats import build, spec_bytes, stored_tensors
from lrcompress.formats.sparse_dictionary import SPARSE_ROWS, SparseDictionary, pack_bits, unpack_bits
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


def decodings(module: SparseDictionary, x: torch.Tensor) -> int:
    """How often a call decodes positions."""
    with mock.patch("lrcompress.formats.sparse_dictionary.unpack_bits", wraps=unpack_bits) as counted:
        module(x)
    return counted.call_count


@pytest.mark.parametrize("rows", [1, SPARSE_ROWS, 3 * SPARSE_ROWS])
@pytest.mark.parametrize("bits", [{}, {"coefficient_bits": 8}])
def test_both_products_multiply_by_the_weight(rows, bits):
    module, weight, bias = many_atoms(**bits)
    assert module.product == "sparse"
    x = torch.randn(2, rows, 40, generator=torch.Generator().manual_seed(1))
    if bits:  # of a row's scale s every code is off by s / 2 at most; the products are by what the codes then give
        exact, weight = weight, module.dense().detach()
        support = torch.zeros(24, 16).scatter(1, module.atoms().long(), 1.0)
        off = module.coefficients_scale[:, None] / 2 * (support @ module.dictionary.abs())
        assert ((weight - exact).abs() <= 1.0001 * off).all()
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad(), mock.patch("torch.nn.functional.embedding_bag", wraps=torch.nn.functional.embedding_bag) as f:
        torch.testing.assert_close(module(x), x @ weight.T + bias, **tolerance)
        assert f.call_count == (2 * rows >= SPARSE_ROWS)
        torch.testing.assert_close(module(x[0, 0]), x[0, 0] @ weight.T + bias, **tolerance)
    torch.testing.assert_close(module(x), x @ weight.T + bias, **tolerance)
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_few_atoms_are_multiplied_dense():
    module = loaded(*dictionary_example((24, 40), 7, False)[:2])
    assert module.product == "dense"
    with torch.no_grad(), mock.patch("torch.nn.functional.embedding_bag", side_effect=AssertionError):
        module(torch.randn(100, 40))


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("bits", [{}, {"coefficient_bits": 8}])
def test_codes_are_decoded_once_and_again_after_every_change(rows, bits):
    module = many_atoms(**bits)[0]
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1))

    def right() -> bool:
        """Up to rounding: sums of 40 and 4 products on the one way, of 16 and 40 on the other, and a bias on both."""
        size = x.abs() @ (module.codes().abs() @ module.dictionary.abs()).T + module.bias.abs()
        off = (module(x) - (x @ module.dense().T + module.bias)).abs()
        return bool((off <= (40 + 4 + 1 + 16 + 40 + 1) * torch.finfo(x.dtype).eps / 2 * size).all())

    with torch.no_grad():
        assert decodings(module, x) == 1
        assert decodings(module, x) == 0
        trained = module.coefficients_scale if bits else module.coefficients
        trained.mul_(3)  # as an optimizer does
        assert right()
        module.positions.copy_(module.positions.flip(0))
        assert right()
        other = many_atoms(**bits)[0]
        other.load_state_dict({k: 2 * v if v.is_floating_point() else v for k, v in other.state_dict().items()})
        module.load_state_dict(other.state_dict())
        assert right()
        state = {k: 2 * v if v.is_floating_point() else v.clone() for k, v in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        assert right()
        module.double()
        x = x.double()
        assert right()
        module.float()
        x = x.float()
        assert right()
        key = "coefficients_scale" if bits else "coefficients"
        setattr(module, key, torch.nn.Parameter(getattr(module, key) * 2))
        assert right()
    with torch.inference_mode():
        assert right()
    with torch.no_grad():
        assert decodings(module, x) == 0
        assert right()


def test_what_is_decoded_is_not_stored_copied_or_kept_alive():
    module, _, _ = many_atoms()
    x = torch.randn(1, 40)
    names = set(module.state_dict())
    with torch.no_grad():
        before = module(x)
        assert set(module.state_dict()) == names
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert not twin._decoded
            assert torch.equal(twin(x), before)
            twin.coefficients.mul_(2)
            assert not torch.equal(twin(x), before)
            assert torch.equal(module(x), before)
        assert module._decoded
        module.coefficients = None  # offloaded
        assert not module._decoded


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


def test_work_of_the_sparse_product():
    """Many rows in float32 multiply the coefficients only; few rows, or bfloat16, the decoded codes."""
    module, _, _ = many_atoms()
    (out, inputs), (atoms, nonzeros) = module.spec.shape, (module.spec.parameters["atoms"], module.spec.rank)
    assert module.multiply_adds(50) == atoms * inputs + out * nonzeros
    assert module.multiply_adds(1) == module.to(torch.bfloat16).multiply_adds(50) == atoms * inputs + out * atoms
    module.float()
    assert module.touched_bytes(50) == 4 * (atoms * inputs + 2 * out * nonzeros + out)
    assert module.touched_bytes(1) == 4 * (atoms * inputs + out * atoms + out)
