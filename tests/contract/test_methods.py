"""One suite over every registered method and each of its formats."""

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.formats import build, spec_bytes
from lrcompress.methods import METHODS, make_method
from lrcompress.protocols import InputStatistics, Site

PAIRS = [(name, form) for name in METHODS.names() for form in METHODS.get(name).formats]
SHAPES = [(24, 40), (40, 24), (32, 32)]


def statistics(features: int) -> tuple[InputStatistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(300, features, generator=generator) * torch.logspace(0, -1.5, features) + 0.3
    found = InputStatistics.zeros(features)
    found.update(rows[:100])
    found.update(rows[100:])
    return found, rows


def weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "form"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
class TestMethod:
    def test_levels_grow_and_end_dense(self, name, form, shape, bias):
        curve = make_method(name, {}, form).curve(Site("w", shape, 0, "w", bias), 2)
        assert (curve.bytes.diff() > 0).all()
        assert (curve.ranks.diff() > 0).all()
        assert int(curve.bytes[-1]) == curve.dense_bytes == shape[0] * shape[1] * 2

    def test_stored_outputs_err_as_much_as_the_curve_says(self, name, form, shape, bias):
        method = make_method(name, {}, form)
        site, dense = Site("w", shape, 0, "w", bias), weight(shape)
        found, rows = statistics(shape[1])
        offset = torch.randn(shape[0]) if bias else None
        curve = method.curve(site, 4)
        artefact = method.decompose(site, dense, found)
        errors = method.errors(artefact, curve)
        assert errors[-1] == 0
        assert (errors.diff() <= 1e-9).all()
        total, before = method.total(artefact), float("inf")
        for level in (0, len(curve.ranks) // 2, len(curve.ranks) - 2):
            spec = method.spec(site, int(curve.ranks[level]), 4)
            assert spec_bytes(spec, 4) == int(curve.bytes[level])
            module = build(spec, torch.float32)
            module.load_state_dict({**method.encode(spec, artefact, offset), "weight": torch.empty(0)})
            expected = rows @ dense.T + (0 if offset is None else offset)
            difference = module(rows) - expected
            measured = float(difference.double().pow(2).sum() / len(rows))
            if method.errors_are_exact:
                assert measured == pytest.approx(float(errors[level]), rel=2e-2, abs=2e-5 * total)
            else:
                assert measured <= 1.5 * float(errors[level]) + 1e-3 * total
                assert measured >= 0.5 * float(errors[level]) - 1e-3 * total
                assert measured <= before
            before = measured

    def test_the_same_input_gives_the_same_bits(self, name, form, shape, bias):
        method, site = make_method(name, {}, form), Site("w", shape, 0, "w", bias)
        found, _ = statistics(shape[1])
        spec = method.spec(site, 3, 2)
        first, second = (method.encode(spec, method.decompose(site, weight(shape), found), None) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", METHODS.names())
def test_the_registry_entry_is_complete(name):
    cls = METHODS.get(name)
    assert cls.paper.startswith("https://")
    assert cls.summary
    assert cls.formats
    with pytest.raises(InputError, match="has no option"):
        make_method(name, {"metrik": "plain"})


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'welore'"):
        make_method("weelore", {})
    with pytest.raises(InputError, match="did you mean 'pivoted'"):
        make_method("lord", {}, "pivotted")
    with pytest.raises(InputError, match="did you mean 'metric'"):
        make_method("lord", {"metrc": "plain"})
    with pytest.raises(InputError, match="metric"):
        make_method("lord", {"metric": "nonsense"})


def test_centred_with_a_bias_is_at_least_as_near_as_uncentred():
    site, dense = Site("w", (32, 32), 0, "w", False), weight((32, 32))
    found, _ = statistics(32)
    curve = make_method("lord", {"metric": "input"}).curve(site, 2)
    errors = {}
    for metric in ("input", "centred"):
        method = make_method("lord", {"metric": metric})
        full = method.decompose(site, dense, found)["energies"]
        errors[metric] = torch.cat([full.flip(0).cumsum(0).flip(0), full.new_zeros(1)])[curve.ranks]
    assert (errors["centred"] <= errors["input"] + 1e-9).all()


def test_welore_keeps_weights_dense_below_the_asked_reduction():
    published = make_method("welore", {"min_rank_reduction": 0.5})
    curve = published.curve(Site("w", (40, 40), 0, "w", False), 2)
    assert curve.ranks.tolist() == [*range(1, 21), 40]
