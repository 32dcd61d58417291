"""Joined weights by the formats that store them: a pivoted owner, whose pivot rows are the right factor of the others."""

import pytest
import torch

from lrcompress.formats import restored
from lrcompress.formats.low_rank import LowRank
from lrcompress.formats.pivoted import Pivoted
from lrcompress.linalg.truncation import decompose
from lrcompress.methods.joining import encode_joined, joined, rounding_loss
from lrcompress.protocols import Spec

SHAPES, WIDTH = [(20, 24), (8, 24), (6, 24)], 24


def specs(rank: int, owner: str) -> list[Spec]:
    made = [Spec(LowRank.name, shape, True, True, parameters={"rank": rank}) for shape in SHAPES]
    return [Spec(owner, SHAPES[0], True, True, parameters={"rank": rank}), *(s.following("owner") for s in made[1:])]


def artefacts(weights: list[torch.Tensor], gram: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    found = []
    for weight in weights:
        spectrum = decompose(weight, gram)
        found.append({"left": spectrum.left, "right": spectrum.right, "energies": spectrum.energies, "gram": gram})
    return found


def rebuilt(rank: int, owner: str, parts: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The weights that a checkpoint of `parts` has, their biases those that were given."""
    biases = [torch.randn(shape[0], generator=torch.Generator().manual_seed(9)) for shape in SHAPES]
    wanted = specs(rank, owner)
    stored = encode_joined(wanted, parts, biases, joined(parts))
    right = stored[0]["pivot.weight" if owner == Pivoted.name else "A.weight"]
    found = []
    for i, (spec, tensors) in enumerate(zip(wanted, stored, strict=True)):
        layer = restored(spec, tensors if i == 0 else {**tensors, "A.weight": right}, torch.float64)
        torch.testing.assert_close(layer.dense_bias(), biases[i].double(), rtol=1e-5, atol=1e-5)
        found.append(layer.dense())
    return found


def errors(weights, found, gram):
    return [float(((d := w - f) @ gram * d).sum()) for w, f in zip(weights, found, strict=True)]


@pytest.fixture
def gram():
    rows = torch.randn(200, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return rows.T @ rows / 200


def random_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("rank", [1, 7, 15])
def test_pivots_of_the_owner_give_what_two_factors_give(gram, rank):
    weights = random_weights()
    parts = artefacts(weights, gram)
    assert joined(parts).spanned(0) >= rank
    pivoted, plain = (rebuilt(rank, owner, parts) for owner in (Pivoted.name, LowRank.name))
    for one, other in zip(pivoted, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    stack = decompose(torch.cat(weights), gram)
    assert sum(errors(weights, pivoted, gram)) == pytest.approx(float(stack.errors()[rank]), rel=1e-4)


@pytest.mark.parametrize("seen", [0, 3, 10])
def test_an_owner_that_sees_too_little_gives_what_its_rows_span(gram, seen):
    """Rows of an owner of rank `seen` span no more: the errors are those of as many components, and nothing overflows."""
    weights = random_weights()
    generator = torch.Generator().manual_seed(1)
    basis = 100 * torch.randn(seen, WIDTH, dtype=torch.float64, generator=generator)
    weights[0] = torch.randn(SHAPES[0][0], seen, dtype=torch.float64, generator=generator) @ basis
    parts = artefacts(weights, gram)
    found = joined(parts)
    assert found.spanned(0) == seen
    rebuilt_weights = rebuilt(15, Pivoted.name, parts)
    assert errors(weights, rebuilt_weights, gram) == pytest.approx(
        [float(e[seen]) for e in found.errors], rel=1e-3, abs=1e-3
    )


def test_zero_weights_are_zero(gram):
    weights = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    assert all(float(weight.abs().max()) == 0 for weight in rebuilt(4, Pivoted.name, artefacts(weights, gram)))


def test_rounding_tells_owners_whose_rows_tell_directions_apart_badly(gram):
    """The true error after bfloat16, over the one before it, where q's rows hardly see what the others do."""
    generator = torch.Generator().manual_seed(4)
    weights = random_weights(5)
    u, _, vt = torch.linalg.svd(weights[0], full_matrices=False)
    weights[0] = (u * torch.logspace(0, -3, len(vt), dtype=torch.float64)) @ vt
    weights[1], weights[2] = (
        0.1 * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES[1:]
    )
    parts = artefacts(weights, gram)
    loss = {
        dtype: rounding_loss(specs(14, Pivoted.name), parts, joined(parts), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert loss[torch.float32] == pytest.approx(1, abs=1e-3)
    assert loss[torch.bfloat16] > 1.2
    assert rounding_loss(specs(14, LowRank.name), parts, joined(parts), torch.bfloat16) < 1.05
    plain = artefacts(random_weights(), gram)
    assert rounding_loss(specs(7, Pivoted.name), plain, joined(plain), torch.bfloat16) < 1.05
