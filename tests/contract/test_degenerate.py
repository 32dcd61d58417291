"""Weights and statistics that are singular in one way or another: every method answers with finite tensors or a word."""

import pytest
import torch

from lrcompress.formats import restored, stored_tensors
from lrcompress.methods import METHODS, make_method
from lrcompress.protocols import InputStatistics, Site
from lrcompress.stages.encode import as_encoded

SHAPE = (24, 32)
GENERATOR = torch.Generator().manual_seed(5)

CASES = [
    *[(name, {}, form, None) for name in METHODS.names() for form in METHODS.get(name).formats],
    *[("lord", {"metric": metric}, None, None) for metric in ("plain", "input", "trace", "two_sided")],
    *[("cospadi", {"metric": "two_sided", **more}, None, None) for more in ({}, {"coupled_rounds": 0})],
    *[("cospadi", {"side": "input", "metric": metric}, None, None) for metric in ("input", "centred", "two_sided")],
    *[("cospadi", {"solver": solver}, None, None) for solver in ("procrustes", "ksvd")],
    ("cospadi", {"dictionary_bits": 8}, None, None),
    *[("eora", {}, None, base) for base in ("rtn:2:8", "gptq:3:8", "wanda:2:4", "sparsegpt:2:4")],
    ("eora", {"factor_bits": 4, "metric": "two_sided"}, None, "rtn:3:8"),
]  # fmt: skip


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


WEIGHTS = {
    "zero": torch.zeros(SHAPE),
    "one rank": torch.outer(random(SHAPE[0]), random(SHAPE[1])),
    "one entry": torch.zeros(SHAPE).index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(2.0)),
    "dead rows": random(*SHAPE) * (torch.arange(SHAPE[0]) % 3 > 0)[:, None],
    "ordinary": random(*SHAPE),
    "tiny": random(*SHAPE) * 1e-30,
    "huge": random(*SHAPE) * 1e15,
}

ROWS = {
    "fewer tokens than features": random(5, SHAPE[1]),
    "one token": random(1, SHAPE[1]),
    "dead channels": random(200, SHAPE[1]) * (torch.arange(SHAPE[1]) % 4 > 0),
    "silence": torch.zeros(9, SHAPE[1]),
    "equal tokens": torch.ones(50, SHAPE[1]),
    "one huge channel": random(200, SHAPE[1]) * torch.tensor([1e6, *[1.0] * (SHAPE[1] - 1)]),
    "ordinary": random(200, SHAPE[1]),
}

GRADIENTS = {
    "none reaches": torch.zeros(4, SHAPE[0]),
    "fewer than outputs": random(3, SHAPE[0]),
    "dead outputs": random(99, SHAPE[0]) * (torch.arange(SHAPE[0]) % 2),
    "ordinary": random(99, SHAPE[0]),
}

SITUATIONS = [
    *[(weight, "ordinary", "ordinary") for weight in WEIGHTS],
    *[("ordinary", rows, "ordinary") for rows in ROWS],
    *[("ordinary", "ordinary", gradients) for gradients in GRADIENTS],
    ("zero", "silence", "none reaches"),
    ("one rank", "fewer tokens than features", "fewer than outputs"),
]


def statistics(rows, gradients):
    found = InputStatistics.zeros(SHAPE[1])
    found.update(ROWS[rows])
    moments = GRADIENTS[gradients].double()
    found.gradients = moments.T @ moments / len(moments)
    return found


@pytest.mark.parametrize(("weight", "rows", "gradients"), SITUATIONS)
@pytest.mark.parametrize(("name", "options", "form", "base"), CASES)
def test_what_is_singular_is_stored_in_finite_numbers(name, options, form, base, weight, rows, gradients):
    """At the beginning and the middle of the curve; the dense weight of what is stored errs no more than nothing at all."""
    method, site = make_method(name, options, form, base), Site("w", SHAPE, 0, "w", False)
    dense, found = WEIGHTS[weight], statistics(rows, gradients)
    curve = method.curve(site, 4)
    artefact = method.decompose(site, dense, found)
    errors, total = method.errors(artefact, curve), method.total(artefact)
    assert torch.isfinite(errors).all()
    if "factor_bits" not in options:  # a rounded component may harm more than it mends
        assert (errors.diff() <= 1e-6 * total).all()
    assert 0 <= total < float("inf")
    for level in {0, len(curve.ranks) // 2} - {len(curve.ranks) - 1}:
        spec = method.spec(site, int(curve.ranks[level]), 4)
        stored = method.encode(spec, artefact, None)
        for tensor in stored.values():
            assert not tensor.is_floating_point() or torch.isfinite(tensor).all()
        assert stored.keys() | {"weight"} == stored_tensors(spec, torch.float32).keys()
        spec = as_encoded(spec, stored)
        outputs = restored(spec, stored, torch.float32)(ROWS[rows]).double()
        wanted = ROWS[rows].double() @ dense.double().T
        if not method.needs_gradients and method.metric != "plain" and weight != "huge":
            assert (outputs - wanted).norm() <= 1.01 * wanted.norm() + 1e-6
