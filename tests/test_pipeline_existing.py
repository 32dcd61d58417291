"""EoRA over existing checkpoints of ours, from end to end on tiny models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.errors import InputError, Interrupted
from lrcompress.formats import DENSE
from lrcompress.model.surgery import dense_parts, stored_layers
from lrcompress.pipeline import compress, make_plan
from lrcompress.recipe import make_recipe
from lrcompress.report.inspection import inspect_model
from lrcompress.stages.naming import output_folder
from tests.commands import run_cli
from tests.conftest import compress_tiny
from tests.test_pipeline import header_bytes, recipe

IDS = torch.arange(40).reshape(2, 20) * 7 % 320
COSPADI = {"name": "cospadi", "rounds": 2}
BASES = {
    "welore": {"method": "welore", "ratio": 0.4},
    "lord": {"method": "lord", "ratio": 0.4},
    "low_rank": {"method": "lord", "ratio": 0.5, "format": "low_rank"},
    "cospadi": {"method": COSPADI, "ratio": 0.4},
    "cospadi 8 bits": {"method": COSPADI | {"coefficient_bits": 8, "dictionary_bits": 8}, "ratio": 0.5},
    "cospadi shared": {"method": COSPADI | {"group": 2}, "ratio": 0.6},
    "quantized": {"method": "eora", "base": "gptq:3:16", "rank": 0, "ratio": None},
    "semi_sparse": {"method": "eora", "base": "wanda:2:4", "rank": 0, "ratio": None},
}


@pytest.fixture
def base(compressed):
    def make(kind, architecture="llama", **changes):
        return compressed(architecture, **{**BASES[kind], **changes})

    return make


def correct(dense, folder, output, *, method=None, **changes):
    """eora over a folder; on the dense model's inputs unless `method` says otherwise, so that layers can be checked."""
    rank = {} if "ratio" in changes else {"rank": 3, "ratio": None}
    if not isinstance(method, str):
        method = {"name": "eora", "propagation": "one_pass", **(method or {})}
    return compress_tiny(
        changes.pop("model", dense), output, **{"method": method, "base": str(folder), **rank, **changes}
    )


def test_sequential_corrections_keep_the_base(llama, base, tmp_path):
    """As published by default: the base's tensors are untouched, the corrections are others than in one pass."""
    folder = base("quantized")
    once = correct(llama, folder, tmp_path / "once")
    twice = correct(llama, folder, tmp_path / "twice", method={"propagation": "sequential"})
    first, second = (load_file(r.folder / "model.safetensors") for r in (once, twice))
    assert all(torch.equal(first[key], second[key]) for key in first if ".base." in key)
    assert any(not torch.equal(first[key], second[key]) for key in first if key.endswith(".A.weight"))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def outputs(model, ids):
    """Inputs of every linear-like layer, by name, and the logits."""
    return model(input_ids=ids, use_cache=False).logits


def layer_inputs(folder, names):
    """Inputs of the dense model's layers on some tokens, (rows, in) float64."""
    model, found = load(folder), {}

    def keep(name):
        def hook(_, args):
            found[name] = args[0].detach().flatten(0, -2).double()

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    from lrcompress.calibration.drawing import calibration_blocks
    from lrcompress.checkpoint.folder import load_tokenizer
    from lrcompress.stages.request import split_samples

    sources = split_samples(make_recipe(json.loads(recipe(folder).model_dump_json())).calibration)
    ids = calibration_blocks(sources, load_tokenizer(folder), 0, folder).ids
    outputs(model, ids)
    return model, found


def error(layer, weight, bias, x):
    """Squared size of what a layer's output gets wrong on x (rows, in), from dense tensors."""
    matrix = layer.weight.detach().double()
    matrix = matrix if isinstance(layer, torch.nn.Linear) else matrix.T
    wrong = x @ (matrix - weight.double()).T
    if layer.bias is not None:
        wrong = wrong + layer.bias.detach().double()
    if bias is not None:
        wrong = wrong - bias.double()
    return float(wrong.square().sum())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", sorted(BASES.keys() - {"cospadi shared"}))
def test_the_base_is_taken_over_and_its_error_falls(make_model, base, tmp_path, architecture, kind):
    dense, folder = make_model(architecture), base(kind, architecture)
    method = {"name": "eora", "sink_share": 0.0}
    result = correct(dense, folder, tmp_path / "out", method=method)
    before, after = read_manifest(folder).modules, read_manifest(result.folder).modules
    stored, kept = load_file(result.folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert after.keys() <= before.keys()
    assert any(spec.format == "sum" for spec in after.values())
    model, reference = load(result.folder), load(dense)
    layers, base_layers = stored_layers(model), stored_layers(load(folder))
    trained, inputs = layer_inputs(dense, before)
    for name, layer in layers.items():
        assert layer.spec.format == "sum"
        assert {**layer.spec.parameters["base"]} == {"format": before[name].format, **before[name].parameters}
        for key, tensor in stored.items():
            if key.startswith(f"{name}.base."):
                assert torch.equal(tensor, kept[key.replace(".base.", ".")])
        weight, bias = dense_parts(layer)
        base_weight, base_bias = dense_parts(base_layers[name])
        torch.testing.assert_close(
            weight, base_weight + (layer.B.weight @ layer.A.weight).detach(), rtol=1e-5, atol=1e-6
        )
        assert (bias is None) is (base_bias is None)
        original = trained.get_submodule(name)
        assert error(original, weight, bias, inputs[name]) < error(original, base_weight, base_bias, inputs[name])
        target = reference.get_submodule(name)
        target.weight.data = weight.T if layer.spec.conv1d else weight
        target.bias = None if bias is None else torch.nn.Parameter(bias)
    torch.testing.assert_close(outputs(model, IDS), outputs(reference, IDS), rtol=1e-3, atol=1e-3)
    report = result.report
    assert report["base"] == str(folder)
    for target in report["targets"]:
        own = 4 * target["shape"][0] if architecture == "gpt2" else 0
        assert target["bytes"] == header_bytes(result.folder, target["name"] + ".") - own
    total = sum(target["bytes"] for target in report["targets"])
    assert report["ratio"]["stored"] == pytest.approx(1 - total / report["bytes"]["targets_dense"])
    shown = {t["name"]: (t["format"], t["rank"], t["bytes"]) for t in inspect_model(str(result.folder))["targets"]}
    assert shown == {t["name"]: (t["format"], t["rank"], t["bytes"]) for t in report["targets"]}


@pytest.mark.parametrize("kind", sorted(BASES.keys() - {"cospadi shared"}))
def test_rank_0_is_the_base_bit_for_bit(make_model, base, tmp_path, kind):
    for architecture in ("llama", "gpt2"):
        folder = base(kind, architecture)
        result = correct(make_model(architecture), folder, tmp_path / architecture, rank=0)
        first, second = load_file(folder / "model.safetensors"), load_file(result.folder / "model.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert read_manifest(folder).modules == read_manifest(result.folder).modules
        assert all(t["relative_error"] > 0 for t in result.report["targets"] if t["format"] != DENSE)


def test_what_a_base_shares_is_stored_with_every_correction(make_model, base, tmp_path):
    """The base's weights are taken over, each with the whole dictionary; the owner may be corrected or not."""
    dense, folder = make_model("llama"), base("cospadi shared")
    assert any(spec.owner for spec in read_manifest(folder).modules.values())
    before = {name: dense_parts(layer)[0] for name, layer in stored_layers(load(folder)).items()}
    after = stored_layers(load(correct(dense, folder, tmp_path / "out", rank=1).folder))
    assert all(layer.spec.owner is None for layer in after.values())
    assert any(layer.spec.format == "sum" for layer in after.values())
    for name, layer in after.items():
        found = layer.base.dense() if layer.spec.format == "sum" else layer.dense()
        torch.testing.assert_close(found, before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["welore", "lord", "semi_sparse"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_centred_corrections_keep_the_mean(make_model, base, tmp_path, kind, rank, architecture):
    """Whatever bias the base has, the layer's mean output is the dense one's."""
    dense, folder = make_model(architecture), base(kind, architecture)
    method = {"name": "eora", "metric": "centred", "sink_share": 0.0}
    result = correct(dense, folder, tmp_path / "out", method=method, rank=rank)
    names = read_manifest(result.folder).modules
    model, inputs = layer_inputs(dense, names)
    for name, layer in stored_layers(load(result.folder)).items():
        weight, bias = dense_parts(layer)
        original, mean = model.get_submodule(name), inputs[name].mean(0)
        matrix = original.weight.double() if isinstance(original, torch.nn.Linear) else original.weight.double().T
        expected = matrix @ mean + (0 if original.bias is None else original.bias.double())
        torch.testing.assert_close(weight.double() @ mean + bias.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_ratio_counts_base_and_correction(llama, base, tmp_path):
    folder = base("semi_sparse")
    with pytest.raises(InputError, match=r"alone removes: ask for a ratio of at most"):
        correct(llama, folder, tmp_path / "out", ratio=0.9)
    result = correct(llama, folder, tmp_path / "out", ratio=0.3)
    assert 0.3 <= result.report["ratio"]["stored"] <= 0.32
    plan = make_plan(recipe(llama, method={"name": "eora", "propagation": "one_pass"}, base=str(folder), ratio=0.3))
    keys = ("name", "format", "rank", "bytes", "relative_error")
    assert [[t[k] for k in keys] for t in plan["targets"]] == [[t[k] for k in keys] for t in result.report["targets"]]


@pytest.mark.parametrize("allocator", ["uniform", "welore", "marginal_error"])
@pytest.mark.parametrize("bits", [16, 8])
def test_weights_that_the_base_leaves_dense_stay_dense(llama, base, tmp_path, allocator, bits):
    folder = base("semi_sparse", target=["*mlp*"])
    method = {"name": "eora", "factor_bits": bits}
    report = correct(llama, folder, tmp_path / "out", method=method, ratio=0.15, allocator=allocator).report
    for target in report["targets"]:
        if "mlp" not in target["name"]:
            assert (target["format"], target["relative_error"]) == (DENSE, 0.0)
    assert any(target["format"] == "sum" for target in report["targets"])


def test_sequential_propagation_and_other_dtypes(llama, base, tmp_path):
    method = {"name": "eora", "propagation": "sequential"}
    correct(llama, base("quantized"), tmp_path / "a", method=method)
    halved = base("quantized", dtype="bfloat16")
    result = correct(llama, halved, tmp_path / "b", dtype="bfloat16")
    first, second = load_file(halved / "model.safetensors"), load_file(result.folder / "model.safetensors")
    codes = [key for key in first if key.endswith((".codes", ".scale"))]
    assert codes
    assert all(torch.equal(first[key], second[key.replace(".codes", ".base.codes").replace(".scale", ".base.scale")])
               for key in codes)  # fmt: skip
    with pytest.raises(InputError, match="stores .* as float32, which bfloat16 does not hold exactly: write with"):
        correct(llama, base("lord"), tmp_path / "c", dtype="bfloat16")


def test_the_command_line(llama, base, tmp_path):
    folder, out = base("lord"), tmp_path / "out"
    made = run_cli(
        "compress", llama, "--method", "eora", "--base", folder, "--rank", 2, "--samples", 4, "--seqlen", 64, "-o", out
    )
    assert made.returncode == 0, made.stderr
    shown = run_cli("inspect", out, "--json", tmp_path / "shown.json")
    assert shown.returncode == 0, shown.stderr
    assert {t["format"] for t in json.loads((tmp_path / "shown.json").read_text())["targets"]} <= {"sum", "dense"}
    measured = run_cli("eval", out, "--tasks", "tokens:python-docs@64", "--limit", 2)
    assert measured.returncode == 0, measured.stderr
    refused = run_cli("compress", llama, "--method", "eora", "--base", llama, "--rank", 2, "-o", tmp_path / "x")
    assert refused.returncode == 2
    assert "is a dense checkpoint" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_resume_needs_the_same_base(llama, base, tmp_path, monkeypatch):
    folder = tmp_path / "base"
    shutil.copytree(base("quantized"), folder)
    data = {"model": str(llama), "method": "eora", "base": str(folder), "rank": 2, "output": str(tmp_path / "out"),
            "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64}}  # fmt: skip

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lrcompress.pipeline.allocate", stop)
        with pytest.raises(Interrupted):
            compress(make_recipe(data))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "touched": "yes"})
    with pytest.raises(InputError, match="cannot resume .*: base files changed"):
        compress(make_recipe(data), resume=True)


def test_the_output_folder_has_the_short_name_of_the_base(llama, base):
    data = {"model": str(llama), "method": "eora", "base": str(base("lord")) + "/", "rank": 4}
    assert output_folder(make_recipe(data)).name == f"{llama.name}-eora-{base('lord').name}-r4"


def changed(folder, to, name, change):
    """A copy of a checkpoint in which one tensor is another one."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


class TestRefusals:
    def refuse(self, message, dense, folder, tmp_path, **changes):
        with pytest.raises(InputError, match=message):
            correct(dense, folder, tmp_path / "refused", **changes)
        assert not (tmp_path / "refused").exists()
        assert not (tmp_path / "refused.partial").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "welore", "ratio": 0.3}, "method welore takes no --base"),
            ({"method": {"name": "eora", "act_order": True}}, "act_order of method eora means nothing to base"),
            ({"method": {"name": "eora", "clip_search": True}}, "clip_search of method eora means nothing to base"),
            ({"model": "/nowhere"}, "model /nowhere does not exist"),
        ],
    )
    def test_before_anything_loads(self, llama, base, tmp_path, changes, message):
        self.refuse(message, llama, base("lord"), tmp_path, **changes)

    def test_what_is_no_compressed_checkpoint(self, llama, base, tmp_path):
        self.refuse("is a dense checkpoint: give a compressed one", llama, llama, tmp_path)
        self.refuse("is a file: give the folder", llama, llama / "config.json", tmp_path)
        self.refuse("does not exist: give the folder", llama, tmp_path / "nothing", tmp_path)
        self.refuse("has no config.json", llama, tmp_path, tmp_path)
        self.refuse("did you mean 'gptq'", llama, "gtpq", tmp_path)
        summed = correct(llama, base("quantized"), tmp_path / "sum").folder
        self.refuse("a base with a correction already", llama, summed, tmp_path)
        config = json.loads((llama / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
        (tmp_path / "awq").mkdir()
        (tmp_path / "awq" / "config.json").write_text(json.dumps(config))
        self.refuse("of the kind 'awq', which cannot be read", llama, tmp_path / "awq", tmp_path)

    def test_another_model(self, make_model, llama, base, tmp_path):
        self.refuse("is a gpt2, the dense model a llama", llama, base("lord", "gpt2"), tmp_path)
        norm = changed(base("lord"), tmp_path / "norm", "model.layers.1.input_layernorm.weight", lambda t: t + 1)
        self.refuse("differ in model.layers.1.input_layernorm.weight", llama, norm, tmp_path)
        shape = changed(base("lord"), tmp_path / "shape", "model.embed_tokens.weight", lambda t: t[:-1].clone())
        self.refuse(r"stores model.embed_tokens.weight as \(319, 32\)", llama, shape, tmp_path)
        codes = changed(
            base("quantized"), tmp_path / "codes", "model.layers.0.mlp.up_proj.codes", lambda t: t[:, 1:].clone()
        )
        self.refuse("stores model.layers.0.mlp.up_proj.codes as .* its config says", llama, codes, tmp_path)
        config = json.loads((norm / "config.json").read_text())
        modules = config["quantization_config"]["modules"]
        name = next(iter(modules))
        modules[name]["shape"] = [30, 30]
        modules[name]["rank"] = 2
        (norm / "config.json").write_text(json.dumps(config))
        self.refuse(rf"stores {name} as \(30, 30\)", llama, norm, tmp_path)
        modules["model.layers.9.q"] = modules.pop(name)
        (norm / "config.json").write_text(json.dumps(config))
        self.refuse("compresses model.layers.9.q, which the dense model does not have", llama, norm, tmp_path)

    def test_targets_that_do_not_fit(self, llama, base, tmp_path):
        folder = base("semi_sparse", target=["*mlp*"])
        self.refuse(
            r"leaves dense what --target '\*q_proj' asks for", llama, folder, tmp_path, target=["*mlp*", "*q_proj"]
        )
        self.refuse("which is no target here", llama, folder, tmp_path, ignore=["*up_proj"])
        assert correct(llama, folder, tmp_path / "out", target=["*mlp*"]).report["base"] == str(folder)

    def test_a_bias_for_the_mean_needs_text(self, llama, base, tmp_path):
        plain = {"name": "eora", "metric": "plain"}
        self.refuse("has added a bias .* metric=plain", llama, base("lord"), tmp_path, method=plain)
        assert correct(llama, base("welore"), tmp_path / "out", method=plain).report["calibration"] is None


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "opt", "gpt_neox"])
def test_other_architectures(make_model, tmp_path, architecture):
    """Tied and renamed tensors are the dense model's too."""
    dense = make_model(architecture)
    folder = compress_tiny(dense, tmp_path / "base", method="welore", ratio=0.4).folder
    report = correct(dense, folder, tmp_path / "out").report
    assert any(target["format"] == "sum" for target in report["targets"])
    assert torch.isfinite(outputs(load(tmp_path / "out"), IDS)).all()
