"""What CoSpaDi's options mean; the contract suite covers its defaults."""

import json

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.formats import build, spec_bytes
from lrcompress.formats.sparse_dictionary import SparseDictionary
from lrcompress.linalg.packing import unpack_bits
from lrcompress.linalg.whitening import damped
from lrcompress.methods import make_method
from lrcompress.protocols import InputStatistics, Site
from lrcompress.report.inspection import inspect_model
from tests.commands import run_cli
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
    method, site, found = (
        make_method("cospadi", {"solver": solver, "rounds": 6, "k_over_s": 2}),
        Site("w", shape, 0, "w", False),
        None,
    )
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
    assert spec.parameters["atoms"] == round(5 * options.get("k_over_s", 2.5))
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
    assert make_method("cospadi", {}).spec(wide, 12, 2).parameters["atoms"] == 30
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


def gradients(outputs: int) -> torch.Tensor:
    rows = torch.randn(90, outputs, generator=torch.Generator().manual_seed(8)).double()
    return (rows * torch.logspace(0, -2, outputs)).T @ (rows * torch.logspace(0, -2, outputs)) / 90


def stored_module(method, site, artefact, rank: int, bias: torch.Tensor | None = None) -> torch.nn.Module:
    spec = method.spec(site, rank, 4)
    module = build(spec, torch.float32)
    module.load_state_dict({**method.encode(spec, artefact, bias), "weight": torch.empty(0)})
    return module.requires_grad_(False)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_sided_without_coupled_rounds_weighs_every_output_by_its_squared_gradient(shape):
    site, dense, found = Site("w", shape, 0, "w", False), weight(shape), statistics(shape[1])
    found.gradients = gradients(shape[0])
    weights = found.gradients.diagonal() + 0.1 * found.gradients.diagonal().mean()
    whitened = weights.sqrt()[:, None] * dense.double()
    method = make_method("cospadi", {"metric": "two_sided", "k_over_s": 2, "coupled_rounds": 0})
    assert method.needs_gradients
    artefact = method.decompose(site, dense, found)
    assert method.total(artefact) == pytest.approx(float(((whitened @ found.gram()) * whitened).sum()), rel=1e-6)
    exact = torch.linalg.eigvalsh(whitened @ found.gram() @ whitened.T).flip(0)[: min(shape)]
    torch.testing.assert_close(artefact["energies"], exact, rtol=1e-6, atol=1e-9 * float(exact[0]))

    def error(module):
        left = (module.dense() - dense).double()
        return float((weights * ((left @ found.gram()) * left).sum(1)).sum())

    blind = make_method("cospadi", {"metric": "input", "k_over_s": 2})
    aware = error(stored_module(method, site, artefact, 6))
    assert aware < 0.9 * error(stored_module(blind, site, blind.decompose(site, dense, found), 6))
    assert 0.999 * float(exact[12:].sum()) <= aware <= 1.001 * float(exact[6:].sum())
    curve = method.curve(site, 4)
    assert aware == pytest.approx(float(method.errors(artefact, curve)[5]), rel=0.5)


def test_trace_scales_errors_and_changes_no_weight():
    site, dense, found = Site("w", (24, 48), 0, "w", False), weight((24, 48)), statistics(48)
    found.gradients = torch.diag(torch.arange(24.0)).double()
    made = {m: make_method("cospadi", {"metric": m}) for m in ("input", "trace")}
    artefacts = {m: method.decompose(site, dense, found) for m, method in made.items()}
    assert made["trace"].total(artefacts["trace"]) == pytest.approx(11.5 * made["input"].total(artefacts["input"]))
    curve = made["input"].curve(site, 4)
    errors = {m: made[m].errors(artefacts[m], curve) for m in made}
    torch.testing.assert_close(errors["trace"], 11.5 * errors["input"])
    modules = {m: stored_module(made[m], site, artefacts[m], 6) for m in made}
    energies = artefacts["input"]["energies"]
    for module in modules.values():
        assert measured(module, dense, found.gram()) <= 1.001 * float(energies[6:].sum())


def test_gradients_that_are_zero_or_not_finite():
    site, dense, found = Site("w", (24, 48), 0, "w", False), weight((24, 48)), statistics(48)
    method = make_method("cospadi", {"metric": "two_sided", "gradient_damping": 0.0})
    found.gradients = torch.zeros(24, 24).double()
    assert all(torch.isfinite(t).all() for t in method.decompose(site, dense, found).values())
    found.gradients[3, 3] = 1.0  # all other outputs count next to nothing, but they are kept
    module = stored_module(method, site, method.decompose(site, dense, found), 6)
    assert torch.isfinite(module.dense()).all()
    found.gradients[3, 3] = float("inf")
    with pytest.raises(ArithmeticError):
        method.decompose(site, dense, found)


@pytest.mark.parametrize("bits", [{}, {"coefficient_bits": 8}, {"coefficient_bits": 8, "dictionary_bits": 8}])
@pytest.mark.parametrize("biased", [False, True])
def test_centred_outputs_have_the_dense_mean(bits, biased):
    shape = (24, 48)
    site, dense, found = Site("w", shape, 0, "w", biased), weight(shape), statistics(48)
    offset = torch.randn(24, generator=torch.Generator().manual_seed(2)) if biased else None
    method = make_method("cospadi", {"metric": "centred", **bits})
    spec = method.spec(site, 5, 4)
    assert spec.bias
    assert spec.added_bias is not biased
    without = make_method("cospadi", bits).spec(site, 5, 4)
    assert spec_bytes(spec, 4) - spec_bytes(without, 4) == (0 if biased else 24 * 4)
    module = stored_module(method, site, method.decompose(site, dense, found), 5, offset)
    mean = found.mean().float()
    torch.testing.assert_close(module(mean), dense @ mean + (0 if offset is None else offset), rtol=1e-4, atol=1e-5)
    centred = found.gram() - torch.outer(found.mean(), found.mean())
    energies = torch.linalg.eigvalsh(dense.double() @ centred @ dense.double().T).flip(0)
    assert 0.999 * float(energies[12:].sum()) <= measured(module, dense, centred) <= 1.01 * float(energies[5:].sum())


@pytest.mark.parametrize("metric", ["plain", "input", "two_sided"])
@pytest.mark.parametrize(
    "bits", [{"coefficient_bits": 8}, {"dictionary_bits": 8}, {"coefficient_bits": 8, "dictionary_bits": 8}]
)
def test_what_is_not_yet_rounded_is_refitted_to_what_is(metric, bits):
    """At many coefficients the rounding is most of the error, so a plain rounding of both halves shows."""
    shape, rank = (64, 48), 20
    site, dense, found = Site("w", shape, 0, "w", False), weight(shape), statistics(48)
    found.gradients = gradients(shape[0])
    rows = torch.ones(64, dtype=torch.float64)
    if metric == "two_sided":
        rows = found.gradients.diagonal() + 0.1 * found.gradients.diagonal().mean()
    gram = torch.eye(48, dtype=torch.float64) if metric == "plain" else found.gram()

    def error(module):
        left = (module.dense().detach() - dense).double() * rows.sqrt()[:, None]
        return float(((left @ gram) * left).sum())

    exact, few = make_method("cospadi", {"metric": metric}), make_method("cospadi", {"metric": metric, **bits})
    whole = stored_module(exact, site, exact.decompose(site, dense, found), rank)
    support = unpack_bits(whole.positions, 64, whole.spec.parameters["atoms"])
    spec = few.spec(site, rank, 4)
    naive = build(spec, torch.float32)
    stored = SparseDictionary.encode(spec, whole.dictionary, whole.codes(), support, None)
    naive.load_state_dict({**stored, "weight": torch.empty(0)})
    refitted = stored_module(few, site, few.decompose(site, dense, found), rank)
    added = error(naive) - error(whole)
    assert added > 0
    assert error(refitted) - error(whole) < 0.9 * added


def test_non_finite_weights_and_unknown_options_are_refused():
    method, dense = make_method("cospadi", {}), weight((24, 48))
    dense[0, 0] = float("nan")
    with pytest.raises(ArithmeticError):
        method.decompose(Site("w", (24, 48), 0, "w", False), dense, statistics(48))
    for options in (
        {"solver": "omp"},
        {"k_over_s": 0.5},
        {"coefficient_bits": 4},
        {"metric": "sideways"},
        {"gradient_damping": -0.1},
        {"rounds": -1},
    ):
        with pytest.raises(InputError, match=next(iter(options))):
            make_method("cospadi", options)


@pytest.mark.parametrize("metric", ["centred", "trace", "two_sided"])
def test_every_metric_makes_a_checkpoint(llama, tmp_path, metric):
    compress_tiny(llama, tmp_path / "out", method={"name": "cospadi", "metric": metric}, allocator="marginal_error")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metric"] == metric
    assert 0.2 <= report["ratio"]["stored"] < 0.24
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    modules = config["quantization_config"]["modules"].values()
    assert modules
    assert all(entry.get("added_bias", False) == (metric == "centred") for entry in modules)


@pytest.mark.parametrize(("options", "ratio"), [({}, 0.3), ({"coefficient_bits": 8, "dictionary_bits": 8}, 0.8)])
def test_a_checkpoint_stores_what_was_asked(llama, tmp_path, options, ratio):
    compress_tiny(llama, tmp_path / "out", method={"name": "cospadi", **options}, ratio=ratio)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert ratio <= report["ratio"]["stored"] < ratio + 0.04
    assert {t["format"] for t in report["targets"]} == {"sparse_dictionary"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = next(iter(config["quantization_config"]["modules"].values()))
    assert {key: entry[key] for key in options} == options


def test_eight_bits_may_be_asked_on_the_command_line(llama, tmp_path):
    bits = {"coefficient_bits": 8, "dictionary_bits": 8}
    options = [part for key, value in bits.items() for part in ("--set", f"{key}={value}")]
    amount = ("--ratio", 0.5, "--samples", 4, "--seqlen", 64)
    done = run_cli("compress", llama, "--method", "cospadi", *options, *amount, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for entry in config["quantization_config"]["modules"].values():
        assert {key: entry[key] for key in bits} == bits


@pytest.mark.parametrize(("k_over_s", "product"), [(2.5, "dense"), (4.0, "sparse")])
def test_inspect_says_how_codes_are_multiplied(llama, tmp_path, k_over_s, product):
    options = {"k_over_s": k_over_s, "rounds": 2}
    compress_tiny(llama, tmp_path / "out", method={"name": "cospadi", **options}, ratio=0.4, target=["*.up_proj"])
    found = [t for t in inspect_model(str(tmp_path / "out"))["targets"] if t["format"] == "sparse_dictionary"]
    assert [t["product"] for t in found] == 3 * [product]
    shown = run_cli("inspect", tmp_path / "out")
    assert f"multiplied: 3 {product}" in shown.stdout, shown.stderr


@pytest.mark.parametrize("metric", ["plain", "input", "centred", "trace", "two_sided"])
@pytest.mark.parametrize("shape", [(24, 48), (48, 24)])
def test_codes_of_the_inputs(metric, shape):
    """side=input: the stored error in the full metric lies between low rank k and low rank s, and near the estimate."""
    site, dense, found = Site("w", shape, 0, "w", False), weight(shape), statistics(shape[1])
    found.gradients = gradients(shape[0])
    method = make_method("cospadi", {"metric": metric, "side": "input", "k_over_s": 2, "coupled_rounds": 12})
    artefact = method.decompose(site, dense, found)
    gram = torch.eye(shape[1], dtype=torch.float64) if metric == "plain" else found.gram(centred=metric == "centred")
    outputs = torch.eye(shape[0], dtype=torch.float64)
    if metric == "two_sided":
        outputs = damped(found.gradients, 0.1)
    if metric == "trace":
        outputs *= found.gradients.diagonal().mean()
    total = float(((outputs @ dense.double() @ gram) * dense.double()).sum())
    assert method.total(artefact) == pytest.approx(total, rel=1e-6)
    curve = method.curve(site, 4)
    level = int((curve.ranks == 6).nonzero())
    module = stored_module(method, site, artefact, 6)
    assert module.spec.format == "transposed_dictionary"
    difference = (module.dense() - dense).double()
    error = float(((outputs @ difference @ gram) * difference).sum())
    tail = artefact["energies"].flip(0).cumsum(0).flip(0)
    assert 0.999 * float(tail[12]) <= error <= 1.05 * float(tail[6])
    assert error == pytest.approx(float(method.errors(artefact, curve)[level]), rel=0.6)
    rows = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(4))
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(module(rows), rows @ module.dense().T + bias, rtol=1e-4, atol=1e-4)
    if metric == "centred":
        expected = dense.double() @ found.mean()
        torch.testing.assert_close(
            module.dense().double() @ found.mean() + bias.double(), expected, rtol=1e-4, atol=1e-4
        )


def test_sides_and_rounds_that_do_not_fit_are_refused():
    for options in ({"coupled_rounds": 2}, {"side": "input", "group": 2}, {"side": "input", "coefficient_bits": 8},
                    {"metric": "two_sided", "coupled_rounds": 1, "dictionary_bits": 8}):  # fmt: skip
        with pytest.raises(InputError, match="coupled_rounds|side=input"):
            make_method("cospadi", options)


@pytest.mark.parametrize("options", [{"side": "input"}, {"side": "input", "coupled_rounds": 0}, {"coupled_rounds": 2}])
def test_gradients_that_are_zero_weigh_nothing_in_full_grams(options):
    site, dense, found = Site("w", (24, 48), 0, "w", False), weight((24, 48)), statistics(48)
    found.gradients = torch.zeros(24, 24).double()
    method = make_method("cospadi", {"metric": "two_sided", **options})
    assert method.needs_gradient_gram
    module = stored_module(method, site, method.decompose(site, dense, found), 6)
    assert torch.isfinite(module.dense()).all()
