"""One suite over every registered method and each of its formats."""

from dataclasses import replace

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.formats import build, spec_bytes
from lrcompress.methods import METHODS, make_method
from lrcompress.protocols import InputStatistics, Site

BASES = ["rtn:4:64", "rtn:3:16", "gptq:3:7", "magnitude:2:4", "wanda:2:4", "sparsegpt:2:4"]
PAIRS = [(name, form) for name in METHODS.names() for form in METHODS.get(name).formats]
SHAPES = [(24, 64), (64, 32), (32, 32)]


def statistics(features: int) -> tuple[InputStatistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(300, features, generator=generator) * torch.logspace(0, -1.5, features) + 0.3
    found = InputStatistics.zeros(features)
    found.update(rows[:100])
    found.update(rows[100:])
    return found, rows


def with_gradients(found: InputStatistics, outputs: int) -> InputStatistics:
    """The same statistics with output gradients of unequal sizes."""
    rows = torch.randn(90, outputs, generator=torch.Generator().manual_seed(8)).double() * torch.logspace(
        0, -1, outputs
    )
    return InputStatistics(found.count, found.total, found.second, rows.T @ rows / 90)


def error_metric(method, found: InputStatistics, outputs: int) -> torch.Tensor:
    """What the method's squared errors weigh the outputs by."""
    if not method.needs_gradients:
        return torch.eye(outputs, dtype=torch.float64)
    damping = method.options.gradient_damping * found.gradients.diagonal().mean()
    return found.gradients + damping * torch.eye(outputs, dtype=torch.float64)


def stored_as(spec, tensors):
    """The module of what was encoded; a coded stream says itself how long it is."""
    if spec.format == "coded":
        spec = replace(spec, parameters={"length": len(tensors["stream"])})
    module = build(spec, torch.float32)
    module.load_state_dict({**tensors, "weight": torch.empty(0)})
    return module


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

    def test_curves_of_many_weights_are_those_of_each(self, name, form, shape, bias):
        method, first = make_method(name, {}, form), Site("a", shape, 0, "a", bias)
        sites = [first, replace(first, name="b", block=3, group="c", kind="k"), replace(first, shape=shape[::-1]),
                 replace(first, bias=not bias), replace(first, itemsize=4), replace(first, head="h")]  # fmt: skip
        known = [method.curve_of(site, 2) for site in sites]
        for site, found in zip(sites, known, strict=True):
            alone = make_method(name, {}, form).curve(site, 2)
            assert (found.name, found.dense_bytes) == (site.name, alone.dense_bytes)
            assert torch.equal(found.ranks, alone.ranks)
            assert torch.equal(found.bytes, alone.bytes)
        if not method.levels_by_name:
            assert known[0].bytes is known[1].bytes

    def test_stored_outputs_err_as_much_as_the_curve_says(self, name, form, shape, bias):
        method = make_method(name, {}, form)
        site, dense = Site("w", shape, 0, "w", bias), weight(shape)
        found, rows = statistics(shape[1])
        found = with_gradients(found, shape[0])
        offset = torch.randn(shape[0]) if bias else None
        curve = method.curve(site, 4)
        artefact = method.decompose(site, dense, found)
        errors = method.errors(artefact, curve)
        assert errors[-1] == 0
        assert (errors.diff() <= 1e-9).all()
        total, before = method.total(artefact), float("inf")
        last = len(curve.ranks) - 1  # dense
        for level in sorted({0, len(curve.ranks) // 2, last - 1} - {last}):
            spec = method.spec(site, int(curve.ranks[level]), 4)
            assert spec_bytes(spec, 4) == int(curve.bytes[level])
            module = stored_as(spec, method.encode(spec, artefact, offset))
            expected = rows @ dense.T + (0 if offset is None else offset)
            difference = (module(rows) - expected).detach().double()
            outer = error_metric(method, found, shape[0])
            if method.name == "cospadi":  # every output by itself
                outer = torch.diag(outer.diagonal())
            measured = float((difference @ outer * difference).sum() / len(rows))
            if method.errors_are_exact:
                assert measured == pytest.approx(float(errors[level]), rel=2e-2, abs=2e-5 * total)
            else:
                assert measured <= 4 * float(errors[level]) + 1e-3 * total  # tall and tiny is the worst
                assert measured >= 0.5 * float(errors[level]) - 1e-3 * total
                assert measured <= before
            before = measured

    def test_the_same_input_gives_the_same_bits(self, name, form, shape, bias):
        method, site = make_method(name, {}, form), Site("w", shape, 0, "w", bias)
        found = with_gradients(statistics(shape[1])[0], shape[0])
        levels = method.curve(site, 2).ranks[:-1]
        spec = method.spec(site, int(levels[min(3, len(levels) - 1)]), 2)
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


def test_two_sided_errors_are_those_of_the_doubly_weighted_difference():
    site, dense = Site("w", (24, 40), 0, "w", False), weight((24, 40))
    found, _ = statistics(40)
    rows = torch.randn(90, 24, generator=torch.Generator().manual_seed(8)).double() * torch.logspace(0, -2, 24)
    found.gradients = rows.T @ rows / 90
    method = make_method("lord", {"metric": "two_sided", "gradient_damping": 0.1})
    curve = method.curve(site, 4)
    artefact = method.decompose(site, dense, found)
    errors = method.errors(artefact, curve)
    outer = found.gradients + 0.1 * found.gradients.diagonal().mean() * torch.eye(24).double()
    for level in (0, 5, len(curve.ranks) - 2):
        rank = int(curve.ranks[level])
        difference = dense.double() - artefact["left"][:, :rank].double() @ artefact["right"][:rank].double()
        expected = float((outer @ difference @ found.gram() * difference).sum())
        assert float(errors[level]) == pytest.approx(expected, rel=1e-3, abs=1e-6 * method.total(artefact))


def test_trace_scales_the_errors_of_the_input_metric():
    site, dense = Site("w", (24, 40), 0, "w", False), weight((24, 40))
    found, _ = statistics(40)
    plain = make_method("lord", {"metric": "input"}).decompose(site, dense, found)["energies"]
    found.gradients = torch.diag(torch.arange(24.0)).double()
    scaled = make_method("lord", {"metric": "trace"}).decompose(site, dense, found)["energies"]
    torch.testing.assert_close(scaled, plain * 11.5)


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


def stored_module(method, site, artefact, rank, offset=None):
    spec = method.spec(site, rank, 4)
    module = build(spec, torch.float32)
    module.load_state_dict({**method.encode(spec, artefact, offset), "weight": torch.empty(0)})
    return module.requires_grad_(False)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("metric", ["input", "centred", "plain"])
def test_eora_errs_as_its_curve_says_over_every_base(base, bits, metric):
    """Also with factors of few bits, whose rounding the curve knows."""
    method = make_method("eora", {"factor_bits": bits, "metric": metric}, base=base)
    site, dense = Site("w", (24, 40), 0, "w", True), weight((24, 40))
    found, rows = statistics(40)
    offset = torch.randn(24, generator=torch.Generator().manual_seed(2))
    curve = method.curve(site, 4)
    artefact = method.decompose(site, dense, found)
    errors = method.errors(artefact, curve)
    assert int(curve.ranks[0]) == 0
    assert method.spec(site, 0, 4).format != "sum"
    for level in range(len(curve.ranks) - 1):
        module = stored_module(method, site, artefact, int(curve.ranks[level]), offset)
        assert spec_bytes(module.spec, 4) == int(curve.bytes[level])
        difference = module(rows) - rows @ dense.T - offset
        measured = float(difference.double().pow(2).sum() / len(rows))
        if metric == "plain":
            measured = float((module.dense() - dense).double().pow(2).sum())
        assert measured == pytest.approx(float(errors[level]), rel=1e-2, abs=2e-5 * method.total(artefact))
    assert method.total(artefact) > 0


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_eora_beats_plain_compensation_in_the_metric(base, rank):
    site, dense = Site("w", (24, 40), 0, "w", False), weight((24, 40))
    found, _ = statistics(40)
    errors = []
    for metric in ("input", "plain"):
        method = make_method("eora", {"metric": metric}, base=base)
        difference = dense - stored_module(method, site, method.decompose(site, dense, found), rank).dense()
        errors.append(float(((difference.double() @ found.gram()) * difference).sum()))
    assert errors[0] < errors[1]


def test_eora_reads_text_only_where_something_needs_it():
    assert make_method("eora", {"metric": "plain"}, base="gptq:4:64").needs_statistics
    assert make_method("eora", {}, base="rtn:4:64").needs_statistics
    plain = make_method("eora", {"metric": "plain"}, base="rtn:4:64")
    assert not plain.needs_statistics
    site = Site("w", (24, 40), 0, "w", False)
    assert plain.decompose(site, weight((24, 40)), None)["energies"].shape == (24,)


def test_eora_refuses_what_means_nothing():
    with pytest.raises(InputError, match="act_order of method eora means nothing to base rtn:4:64"):
        make_method("eora", {"act_order": True}, base="rtn:4:64")
    with pytest.raises(InputError, match="factor_bits"):
        make_method("eora", {"factor_bits": 5})
    with pytest.raises(InputError, match="did you mean 'sparsegpt'"):
        make_method("eora", {}, base="sparsgpt:2:4")
    with pytest.raises(InputError, match="method lord takes no --base"):
        make_method("lord", {}, base="rtn:4:64")


def test_a_base_that_is_not_smaller_leaves_the_weight_dense():
    curve = make_method("eora", {}, base="rtn:8:1").curve(Site("w", (24, 40), 0, "w", False), 2)
    assert curve.ranks.tolist() == [24]
    assert curve.bytes.tolist() == [24 * 40 * 2]
