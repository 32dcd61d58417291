"""Dictionaries shared among blocks, from end to end: files, loading, resuming, refusals."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrcompress.errors import InputError, Interrupted
from lrcompress.formats import StoredLinear, build, spec_bytes
from lrcompress.methods import make_method
from lrcompress.model.surgery import dense_parts, stored_layers
from lrcompress.pipeline import compress, make_plan
from lrcompress.protocols import InputStatistics, Site
from lrcompress.recipe import make_recipe
from lrcompress.report.inspection import inspect_model
from lrcompress.stages import store as store_stage
from lrcompress.stages.sharing import joint_curve, joint_specs, levels_of
from tests.conftest import compress_tiny

IDS = torch.arange(2, 42).reshape(2, 20)


def options(group: int, **more: object) -> dict[str, object]:
    return {"name": "cospadi", "group": group, "rounds": 4, **more}


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def grouped(compressed):
    def make(architecture="llama", **more):
        return compressed(architecture, method=options(2, **more), ratio=0.3)

    return make


def modules(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"metric": "centred"}, {"coefficient_bits": 8, "dictionary_bits": 8}])
def test_a_loaded_model_computes_with_the_dictionaries_of_other_blocks(make_model, grouped, architecture, more):
    folder = grouped(architecture, **more)
    model, reference = load(folder), load(make_model(architecture))
    stored = load_file(folder / "model.safetensors")
    names = {k.rpartition(".dictionary")[0] for k in stored if ".dictionary" in k}
    for name, module in stored_layers(model).items():
        owner = module.spec.owner or name
        assert (owner == name) == (name in names)
        dictionary, codes = stored[f"{owner}.dictionary"].float(), module.codes().detach()
        if "dictionary_bits" in more:
            dictionary = dictionary * stored[f"{owner}.dictionary_scale"][:, None]
        layer = reference.get_submodule(name)
        weight = codes @ dictionary
        torch.testing.assert_close(dense_parts(module)[0], weight, rtol=1e-4, atol=1e-5)
        layer.weight.data = weight.T if module.spec.conv1d else weight
        layer.bias = None if module.bias is None else torch.nn.Parameter(module.bias.detach())
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=1e-3)


def test_three_blocks_in_twos_leave_one_alone(grouped):
    shared = {name: entry.get("shared") for name, entry in modules(grouped()).items()}
    assert shared["model.layers.1.mlp.up_proj"] == "model.layers.0.mlp.up_proj"
    assert {name.split(".")[2] for name, owner in shared.items() if owner} == {"1"}
    levels = {}
    for name, entry in modules(grouped()).items():
        levels.setdefault((entry.get("shared", name), entry["atoms"], entry["rank"]), []).append(name)
    assert sorted(len(names) for names in levels.values()) == [1] * 7 + [2] * 7


def test_bytes_are_those_of_the_files(grouped):
    report = json.loads((grouped() / "report.json").read_text())
    plan = json.loads((grouped() / "plan.json").read_text())
    stored = load_file(grouped() / "model.safetensors")
    assert [t["bytes"] for t in plan["targets"]] == [t["bytes"] for t in report["targets"]]
    for target in report["targets"]:
        own = [t for k, t in stored.items() if k.startswith(target["name"] + ".")]
        assert target["bytes"] == sum(t.numel() * t.itemsize for t in own)
    assert 0.3 <= report["ratio"]["stored"] < 0.36
    assert sum(t["bytes"] for t in report["targets"]) == report["bytes"]["targets_stored"]
    inspected = inspect_model(str(grouped()), spectra=True)
    assert inspected["bytes"]["targets_stored"] == report["bytes"]["targets_stored"]
    model = load(grouped())
    for target in inspected["targets"]:
        entry = modules(grouped())[target["name"]]
        assert target.get("shared") == entry.get("shared")
        values = torch.linalg.svdvals(dense_parts(stored_layers(model)[target["name"]])[0].double())
        assert target["spectrum"][0] == pytest.approx(float(values[0]), rel=1e-4)


def test_a_group_of_one_is_no_group(llama, tmp_path):
    for name, method in (("one", options(1)), ("default", {"name": "cospadi", "rounds": 4})):
        compress_tiny(llama, tmp_path / name, method=method)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "default"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert modules(tmp_path / "one") == modules(tmp_path / "default")


def test_saving_copying_moving_training_and_making_dense(grouped, tmp_path):
    model = load(grouped())
    expected = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    twin = copy.deepcopy(model)
    follower, owner = ("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj")
    with torch.no_grad():
        twin.get_submodule(owner).dictionary.mul_(2)
    assert torch.equal(logits(model), expected)
    weights = [dense_parts(m.get_submodule(follower))[0] for m in (model, twin)]
    torch.testing.assert_close(weights[1], 2 * weights[0])
    assert torch.isfinite(model.to(torch.bfloat16)(input_ids=IDS).logits).all()
    model = load(grouped())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for m in stored_layers(model).values() for p in m.parameters())
    dense = model.dequantize()
    assert not any(isinstance(m, StoredLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)


def test_the_owner_of_a_dictionary_may_be_offloaded(grouped, tmp_path):
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "cpu"}
    outside = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    layout = {**outside, **places}
    model = AutoModelForCausalLM.from_pretrained(grouped(), device_map=layout, offload_folder=str(tmp_path))
    for _ in range(2):
        torch.testing.assert_close(logits(model), logits(load(grouped())))


def test_compiled_layers_find_the_dictionary(grouped):
    model = load(grouped())
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x @ dense_parts(layer)[0].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_a_later_member_needs_nothing_that_was_in_memory(llama, grouped, tmp_path, monkeypatch, stopped_at):
    """Interrupted after block `stopped_at` was written, with and without the scratch file of what is shared."""
    recipe = make_recipe({
        "model": str(llama), "method": options(2), "ratio": 0.3, "output": str(tmp_path / "out"),
        "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64},
    })  # fmt: skip
    step = store_stage.HeldOutCheck.step

    def interrupt(self, block, *rest):
        step(self, block, *rest)
        if block == stopped_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store_stage.HeldOutCheck, "step", interrupt)
        with pytest.raises(Interrupted, match="resume"):
            compress(recipe)
    scratch = list((tmp_path / "out.partial").rglob("shared-*.safetensors"))
    assert len(scratch) == 7
    for path in scratch[::2]:
        path.unlink()
    compress(recipe, resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (grouped() / "model.safetensors").read_bytes()


def test_an_allocator_gives_a_group_one_level(llama, tmp_path):
    compress_tiny(llama, tmp_path / "out", method=options(2, metric="input"), allocator="marginal_error", ratio=0.4)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0.4 <= report["ratio"]["stored"] < 0.46
    ranks = {t["name"]: (t["format"], t["rank"]) for t in report["targets"]}
    for name, level in ranks.items():
        if ".layers.1." in name:
            assert ranks[name.replace(".layers.1.", ".layers.0.")] == level


def test_errors_of_a_shared_dictionary_are_estimated():
    """Within a factor of three, of weights with decaying spectra and Grams of their own."""
    method, shape = make_method("cospadi", {"group": 2}), (48, 64)
    sites, artefacts, dense = [], [], []
    for block in range(2):
        generator = torch.Generator().manual_seed(block)
        rows = torch.randn(400, 64, generator=generator) * torch.logspace(0, -1, 64)
        found = InputStatistics.zeros(64)
        found.update(rows @ torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q)
        dense.append((torch.randn(shape, generator=generator), found.gram()))
        sites.append(Site(f"b{block}", shape, block, "g", False, kind="w"))
        artefacts.append(method.decompose(sites[-1], dense[-1][0], found))
    curve = joint_curve(method, sites, 4)
    for level in (4, len(curve.ranks) // 2, len(curve.ranks) - 2):
        specs = joint_specs(method, sites, int(curve.ranks[level]), 4)
        assert sum(spec_bytes(spec, 4) for spec in specs) == int(curve.bytes[level])
        stored = method.encode_together(specs, artefacts, [None, None])
        for spec, part, artefact, (weight, gram), site in zip(specs, stored, artefacts, dense, sites, strict=True):
            module = build(spec.alone(), torch.float32)
            module.load_state_dict({"dictionary": stored[0]["dictionary"], **part, "weight": torch.empty(0)})
            left = (module.dense().detach() - weight).double()
            measured = float(((left @ gram) * left).sum())
            estimated = float(levels_of(method.errors(artefact, method.curve(site, 4)), curve)[level])
            assert estimated / 3 < measured < 3 * estimated


def test_sharing_makes_room_for_more(llama):
    def planned(group):
        data = {"model": str(llama), "method": options(group), "ratio": 0.3, "calibration": {"source": "python-docs"}}
        return {t["name"]: t["rank"] for t in make_plan(make_recipe(data))["targets"]}

    alone, shared = planned(1), planned(2)
    assert all(shared[name] > rank for name, rank in alone.items() if ".layers.1.mlp" in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "ksvd"}, "needs solver=htp"),
        ({"propagation": "sequential"}, "leave one out"),
        ({"group": 0}, "group"),
    ],
)
def test_what_cannot_share_is_refused(llama, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        compress_tiny(llama, tmp_path / "out", method={**options(2), **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": "model.layers.9.mlp.up_proj"}, "stores nothing to share"),
        ({"shared": "model.layers.1.mlp.gate_proj"}, "stores nothing to share"),
        ({"shared": "model.layers.0.mlp.down_proj"}, "cannot have"),
        ({"shared": "model.layers.0.mlp.up_proj", "format": "low_rank"}, "cannot have"),
        ({"shared": 3}, "stores nothing to share"),
        ({"shared": ["model.layers.0.mlp.up_proj"]}, "stores nothing to share"),
        ({"shared": "model.layers.0.mlp.up_proj", "format": "pivoted"}, "shares nothing"),
    ],
)
def test_a_manifest_that_shares_what_is_not_there_is_refused(grouped, tmp_path, change, message):
    for path in grouped().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
