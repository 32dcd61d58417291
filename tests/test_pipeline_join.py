"""--set join=auto: weights that share their right factor, chosen by numbers, through every door."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.export.dense import export_dense
from lrcompress.linalg.truncation import decompose
from lrcompress.model.surgery import dense_parts, stored_layers
from lrcompress.pipeline import make_plan
from lrcompress.recipe import make_recipe
from lrcompress.report.inspection import inspect_model
from lrcompress.training.choices import choose
from tests.adapters.conftest import logits
from tests.conftest import compress_tiny

LOW = {"format": "low_rank", "ratio": 0.6, "allocator": "marginal_error"}
PIVOTED = {"format": "pivoted", "ratio": 0.45}


@pytest.fixture(scope="module")
def related(llama, tmp_path_factory):
    """A llama whose k and v of blocks 0 and 1 see what q sees, and whose o_proj of block 2 is nearly that of block 1."""
    folder = tmp_path_factory.mktemp("related")
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for block in (0, 1):
        rows = torch.randn(10, 32, generator=generator)
        for kind, size in (("q", 32), ("k", 16), ("v", 16)):
            name = f"model.layers.{block}.self_attn.{kind}_proj.weight"
            tensors[name] = 0.1 * torch.randn(size, 10, generator=generator) @ rows + 0.05 * tensors[name]
    name = "model.layers.{}.self_attn.o_proj.weight"
    tensors[name.format(2)] = tensors[name.format(1)] + 0.02 * tensors[name.format(2)]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def joined(related, tmp_path_factory):
    made = {}

    def make(**recipe):
        key = json.dumps(recipe, sort_keys=True)
        if key not in made:
            made[key] = compress_tiny(related, tmp_path_factory.mktemp("joined") / "model", **{**LOW, **recipe})
        return made[key]

    return make


CASES = [({"name": "lord", "metric": "centred"}, LOW), ({"name": "lord", "metric": "trace"}, LOW),
         ({"name": "welore", "metric": "plain"}, LOW), ({"name": "auto"}, LOW),
         ({"name": "lord", "metric": "centred"}, PIVOTED), ({"name": "auto"}, PIVOTED)]  # fmt: skip


@pytest.mark.parametrize(("method", "how"), CASES, ids=lambda v: "-".join(map(str, v.values())))
def test_joined_weights_load_and_compute_the_same(joined, tmp_path, method, how):
    result = joined(method={**method, "join": "auto"}, **how)
    groups = {frozenset(name.split("layers.")[1] for name in entry["weights"]) for entry in result.report["joined"]}
    assert any(len(group) > 1 for group in groups)
    modules = read_manifest(result.folder).modules
    followers = {name: spec for name, spec in modules.items() if spec.owner is not None}
    assert len(followers) == sum(len(entry["weights"]) - 1 for entry in result.report["joined"])
    stored = load_file(result.folder / "model.safetensors")
    assert not any(f"{name}.A.weight" in stored for name in followers)
    counted = sum(t.nbytes for n, t in stored.items() if n.startswith(tuple(f"{m}." for m in modules)))
    assert sum(t["bytes"] for t in result.report["targets"] if t["name"] in modules) == counted
    owners = {spec.owner for spec in followers.values()}
    assert {modules[name].format for name in owners} == {how["format"]}
    assert {spec.format for spec in followers.values()} == {"low_rank"}
    assert how["ratio"] <= result.report["ratio"]["stored"] < how["ratio"] + 0.02

    model = AutoModelForCausalLM.from_pretrained(result.folder)
    expected = logits(model)
    export_dense(str(result.folder), tmp_path / "dense")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected, rtol=1e-4, atol=1e-4
    )
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    torch.testing.assert_close(logits(model.dequantize()), expected, rtol=1e-4, atol=1e-4)
    seen = inspect_model(str(result.folder))
    assert sum("shared" in target for target in seen["targets"]) == len(followers)


@pytest.mark.parametrize("how", [LOW, PIVOTED], ids=lambda how: how["format"])
def test_errors_are_those_of_the_best_joint_truncation(joined, related, how):
    """metric=plain: the stack's singular values say what q, k and v of one input lose."""
    result = joined(method={"name": "lord", "metric": "plain", "join": "auto"}, **how)
    dense, layers = (
        load_file(related / "model.safetensors"),
        stored_layers(AutoModelForCausalLM.from_pretrained(result.folder)),
    )
    errors = {target["name"]: target["relative_error"] for target in result.report["targets"]}
    checked = 0
    for entry in result.report["joined"]:
        weights = [dense[f"{name}.weight"].double() for name in entry["weights"]]
        values = torch.linalg.svdvals(torch.cat(weights)) ** 2
        lost = 0.0
        for name, weight in zip(entry["weights"], weights, strict=True):
            own = float((weight - dense_parts(layers[name])[0]).square().sum())
            assert errors[name] == pytest.approx((own / float(weight.square().sum())) ** 0.5, rel=1e-3)
            lost += own
        assert lost == pytest.approx(float(values[entry["rank"] :].sum()), rel=1e-3)
        assert entry["squared_error_together"] < entry["squared_error_apart"]
        checked += 1
    assert checked


@pytest.mark.parametrize("how", [LOW, PIVOTED], ids=lambda how: how["format"])
def test_what_is_joined_errs_less_than_apart_at_its_bytes(joined, related, how):
    result = joined(method={"name": "lord", "metric": "input", "join": "auto"}, **how)
    apart = joined(method={"name": "lord", "metric": "input"}, **how)
    assert "joined" not in apart.report
    names = {name for entry in result.report["joined"] for name in entry["weights"]}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"} <= names
    before = {t["name"]: t for t in apart.report["targets"]}
    for entry in result.report["joined"]:
        assert entry["bytes_apart"] <= sum(before[name]["bytes"] for name in entry["weights"])
    total = [sum(t["relative_error"] ** 2 for t in r.report["targets"] if t["name"] in names) for r in (result, apart)]
    assert total[0] < total[1]


def test_unrelated_weights_stay_apart(llama, tmp_path):
    """At a small ratio a shared factor has more numbers than two of its own, whatever weights have in common."""
    data = {"model": str(llama), "method": {"name": "lord", "metric": "plain", "join": "auto"}, "ratio": 0.1,
            "format": "low_rank", "calibration": {"samples": 2, "seqlen": 32}}  # fmt: skip
    assert "joined" not in make_plan(make_recipe(data))


@pytest.mark.parametrize(
    "how",
    [LOW, PIVOTED, {**PIVOTED, "ratio": 0.25, "allocator": "uniform"}],
    ids=lambda how: f"{how['format']}-{how['ratio']}",
)
def test_a_joined_checkpoint_is_compressed_further(joined, tmp_path, how):
    first = joined(method={"name": "lord", "metric": "plain", "join": "auto"}, **how)
    if how["ratio"] < 0.3:  # a rank above what a follower can have alone
        assert any(s.rank > min(s.shape) for s in read_manifest(first.folder).modules.values())
    second = compress_tiny(first.folder, tmp_path / "out", method={"name": "lord", "metric": "plain"}, ratio=0.8)
    before, after = (stored_layers(AutoModelForCausalLM.from_pretrained(r.folder)) for r in (first, second))
    for target in second.report["targets"]:
        weight = dense_parts(before[target["name"]])[0] if target["name"] in before else None
        if weight is not None and target["relative_error"] > 0:
            own = (weight - dense_parts(after[target["name"]])[0]).square().sum()
            assert float(own) == pytest.approx(float(decompose(weight).errors()[target["rank"]]), rel=1e-2)


def test_what_does_not_go_together_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match="propagation=sequential.*join"):
        compress_tiny(llama, tmp_path / "out", method={"name": "lord", "join": "auto", "propagation": "sequential"})
    with pytest.raises(InputError, match="no option 'join'"):
        compress_tiny(llama, tmp_path / "out", method={"name": "eora", "join": "auto"})
    with pytest.raises(InputError, match="join"):
        compress_tiny(llama, tmp_path / "out", method={"name": "lord", "join": "all"})


@pytest.mark.parametrize("how", [LOW, PIVOTED], ids=lambda how: how["format"])
def test_training_singular_values_begins_with_the_same_model(joined, how):
    """Followers multiply by the owner's right factor: where that is split up, it must stay what it is."""
    folder = joined(method={"name": "lord", "metric": "plain", "join": "auto"}, **how).folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    found = choose(model, "singular-values", CheckpointReader(folder))
    torch.testing.assert_close(logits(found.model), before, rtol=1e-4, atol=1e-4)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("how", "leaf"), [(LOW, "A"), (PIVOTED, "pivot")])
def test_an_adapter_on_a_shared_factor_is_not_merged(joined, how, leaf):
    folder = joined(method={"name": "lord", "metric": "plain", "join": "auto"}, **how).folder
    config = LoraConfig(target_modules=[leaf], r=2, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    with pytest.raises(InputError, match="share"):
        model.merge_and_unload()
