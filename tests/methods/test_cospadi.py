"""What CoSpaDi's options mean; the contract suite covers its defaults."""

import json

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.formats import build, spec_bytes
from lrcompress.methods import make_method
from lrcompress.protocols import InputStatistics, Site
from tests.conftest import compress_tiny

SHAPES = [(48, 24), (24, 48)]


def statistics(features: int, rows: int = 300) -> InputStatistics:
    generator = torch.Generator().manual_seed(3)
    found = InputStatistics.zeros(features)
    found.update(torch.randn(rows, features, generator=generator) * torch.logspace(0, -1.5, features) + 0.3)
    return found


def weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def measured(module: torch.nn.Module, dense: torch.Tensor, gram: torch.Tensor) -> float:
    left = (module.dense().detach() - dense).double()
    return float(((left @ gram) * left).sum())


@pytest.mark.parametrize("solver", ["htp", "procrustes", "ksvd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_solver_errs_between_rank_k_and_rank_s(solver, shape):
    method, site, found = make_method("cospadi", {"solver": solver, "rounds": 6}), Site("w", shape, 0, "w", False), None
    found = statistics(shape[1])
    artefact = method.decompose(site, weight(shape), found)
    energies = artefact["energies"]
    for rank in (2, 7, 10):
        spec = method.spec(site, rank, 4)
        assert spec.parameters == {"rank": rank, "atoms": 2 * rank}
        module = build(spec, torch.float32)
        module.load_state_dict({**method.encode(spec, artefact, None), "weight": torch.empty(0)})
        error = measured(module, weight(shape), found.gram())
        assert error >= 0.999 * float(energies[2 * rank :].sum())
        if solver != "ksvd":  # which has no warm start in the leading directions
            assert error <= 1.001 * float(energies[rank:].sum())


@pytest.mark.parametrize(
    "options", [{"coefficient_bits": 8}, {"dictionary_bits": 8, "coefficient_bits": 8}, {"k_over_s": 3.5}]
)
def test_options_change_bytes_and_are_kept_in_the_spec(options):
    shape = (48, 24)
    method, site = make_method("cospadi", options), Site("w", shape, 0, "w", True)
    curve = method.curve(site, 2)
    assert (curve.bytes.diff() > 0).all()
    spec = method.spec(site, 5, 2)
    assert spec.parameters["atoms"] == round(5 * options.get("k_over_s", 2.0))
    assert spec_bytes(spec, 2) == int(curve.bytes[4]) != int(make_method("cospadi", {}).curve(site, 2).bytes[4])
    artefact = method.decompose(site, weight(shape), statistics(24))
    module = build(spec, torch.float32)
    offset = torch.randn(48)
    module.load_state_dict({**method.encode(spec, artefact, offset), "weight": torch.empty(0)})
    assert torch.equal(module.dense_bias().detach(), offset)
    error, energies = measured(module, weight(shape), statistics(24).gram()), artefact["energies"]
    assert 0.999 * float(energies[spec.parameters["atoms"] :].sum()) <= error <= 1.01 * float(energies[5:].sum())


def test_an_orthonormal_dictionary_has_at_most_as_many_atoms_as_features():
    wide = Site("w", (64, 16), 0, "w", False)
    assert make_method("cospadi", {"solver": "procrustes"}).spec(wide, 12, 2).parameters["atoms"] == 16
    assert make_method("cospadi", {}).spec(wide, 12, 2).parameters["atoms"] == 24
    assert make_method("cospadi", {"k_over_s": 8}).spec(wide, 12, 2).parameters["atoms"] == 64


@pytest.mark.parametrize("metric", ["plain", "input"])
@pytest.mark.parametrize("kind", ["zero", "rank one", "few tokens"])
def test_singular_weights_and_grams(metric, kind):
    dense = weight((24, 48))
    if kind == "zero":
        dense = torch.zeros_like(dense)
    elif kind == "rank one":
        dense = torch.outer(dense[:, 0], dense[0])
    method, site = make_method("cospadi", {"metric": metric}), Site("w", (24, 48), 0, "w", False)
    found = statistics(48, 5 if kind == "few tokens" else 300)
    artefact = method.decompose(site, dense, found)
    spec = method.spec(site, 6, 2)
    stored = method.encode(spec, artefact, None)
    assert all(torch.isfinite(t).all() for t in stored.values())
    module = build(spec, torch.float32)
    module.load_state_dict({**stored, "weight": torch.empty(0)})
    gram = found.gram() if metric == "input" else torch.eye(48, dtype=torch.float64)
    if kind != "few tokens" or metric == "input":
        assert measured(module, dense, gram) <= 1e-6 * method.total(artefact) + 1e-12


def test_non_finite_weights_and_unknown_options_are_refused():
    method, dense = make_method("cospadi", {}), weight((24, 48))
    dense[0, 0] = float("nan")
    with pytest.raises(ArithmeticError):
        method.decompose(Site("w", (24, 48), 0, "w", False), dense, statistics(48))
    for options in (
        {"solver": "omp"},
        {"k_over_s": 0.5},
        {"coefficient_bits": 4},
        {"metric": "centred"},
        {"rounds": -1},
    ):
        with pytest.raises(InputError, match=next(iter(options))):
            make_method("cospadi", options)


@pytest.mark.parametrize(("options", "ratio"), [({}, 0.3), ({"coefficient_bits": 8, "dictionary_bits": 8}, 0.8)])
def test_a_checkpoint_stores_what_was_asked(llama, tmp_path, options, ratio):
    compress_tiny(llama, tmp_path / "out", method={"name": "cospadi", **options}, ratio=ratio)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert ratio <= report["ratio"]["stored"] < ratio + 0.04
    assert {t["format"] for t in report["targets"]} == {"sparse_dictionary"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = next(iter(config["quantization_config"]["modules"].values()))
    assert {key: entry[key] for key in options} == options
