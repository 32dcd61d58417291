"""Every family of causal language models goes through compress, write, load and generate; experts in detail."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lrcompress.calibration.routing import LEAST_SHARE, complete
from lrcompress.checkpoint.experts import ExpertReader
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.export.dense import export_dense
from lrcompress.model.experts import LinearExperts, fuse, linear_experts, linearise
from lrcompress.model.skeleton import checkpoint_names, empty_model
from lrcompress.model.surgery import dense_parts, stored_layers
from lrcompress.model.targets import is_linear
from lrcompress.protocols import InputStatistics, Site
from lrcompress.report.inspection import inspect_model
from tests.architectures import FAMILIES, MIXTURES, configs
from tests.conftest import compress_tiny

IDS = torch.arange(2, 42).reshape(2, 20)
METHODS = [
    {"method": {"name": "lord", "metric": "plain"}},
    {"method": {"name": "lord", "metric": "two_sided"}},
    {"method": {"name": "lord", "propagation": "sequential", "toward_dense": 0.5}},
    {"method": "welore"},
    {"method": "cospadi"},
    {"method": "eora", "base": "rtn:4:32", "ratio": 0.5},
    {"method": "auto"},
]


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def with_dense_weights(dense, compressed):
    """The dense model, its experts linear where those of `compressed` are, with every stored weight multiplied out."""
    filled = linearised(copy.deepcopy(dense), compressed)
    for name, layer in stored_layers(compressed).items():
        weight, bias = dense_parts(layer)
        target = filled.get_submodule(name)
        target.weight = nn.Parameter(weight.T if layer.spec.conv1d else weight)
        if bias is not None:
            target.bias = nn.Parameter(bias)
    return filled


@torch.no_grad()
def linearised(model, like):
    """`model` with its fused experts taken apart by their layout as transformers documents it."""
    for name, experts in linear_experts(like).items():
        fused = model.get_submodule(name)
        weights = {key: tensor.detach().clone() for key, tensor in fused.named_parameters()}
        if fused.is_transposed:
            weights |= {key: t.transpose(1, 2) for key, t in weights.items() if t.dim() == 3}
        apart = LinearExperts(fused)
        for index in range(experts.count):
            expert = apart.get_submodule(str(index))
            for suffix, leaf in (("", "weight"), ("_bias", "bias")):
                if f"down_proj{suffix}" in weights:
                    both = weights[f"gate_up_proj{suffix}"][index]
                    gate, up = both.chunk(2) if fused.is_concatenated else (both[::2], both[1::2])
                    for part, tensor in (("gate_proj", gate), ("up_proj", up)):
                        setattr(expert.get_submodule(part), leaf, nn.Parameter(tensor.clone()))
                    down = weights[f"down_proj{suffix}"][index]
                    setattr(expert.down_proj, leaf, nn.Parameter(down.clone()))
        model.set_submodule(name, apart)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(make_model, tmp_path, family):
    """Its matrices have rank 4 and are stored at higher ranks: the result computes what the dense model does."""
    model = make_model(family, rank=4)
    result = compress_tiny(
        model,
        tmp_path / "out",
        method={"name": "lord", "metric": "input"},
        format="low_rank",
        calibration={"source": "python-docs", "samples": 2, "seqlen": 32},
    )
    dense, loaded = logits(load(model)), load(result.folder)
    assert {t["name"] for t in result.report["targets"] if t["format"] != "dense"} == set(stored_layers(loaded))
    assert {t["format"] for t in result.report["targets"]} == {"low_rank"}
    assert (logits(loaded) - dense).abs().max() < 1e-4 * dense.abs().max()
    generates(loaded)


def generates(model):
    with torch.no_grad():
        written = model.generate(IDS[:1, :5], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape == (1, 8)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", METHODS, ids=lambda r: json.dumps(r["method"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_every_method(make_model, tmp_path, family, recipe):
    result = compress_tiny(make_model(family), tmp_path / "out", **recipe)
    loaded = load(result.folder)
    assert {t["name"] for t in result.report["targets"] if t["format"] != "dense"} == set(stored_layers(loaded))
    assert 0 <= result.report["ratio"]["stored"] - recipe.get("ratio", 0.2) < 0.01
    expected = logits(with_dense_weights(load(make_model(family)), loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()
    generates(loaded)


@pytest.fixture(scope="module")
def mixture(make_model, tmp_path_factory):
    """mixture(family): a mixture of experts compressed with metric=input, once a module."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            made[family] = compress_tiny(make_model(family), folder, method={"name": "lord", "metric": "input"})
        return made[family]

    return make


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_by_the_dense_ones(make_model, mixture, tmp_path, family):
    """Loaded, exported and dequantised, it computes what the dense model does with the stored weights in its place."""
    result = mixture(family)
    loaded = load(result.folder)
    assert sum(".experts." in target["name"] for target in result.report["targets"]) > 10
    expected = logits(with_dense_weights(load(make_model(family)), loaded))
    assert (logits(loaded) - expected).abs().max() < 2e-4 * expected.abs().max()
    export_dense(str(result.folder), tmp_path / "dense")
    exported = load(tmp_path / "dense")
    assert type(exported) is type(loaded)
    assert not linear_experts(exported)
    assert (logits(exported) - expected).abs().max() < 2e-4 * expected.abs().max()
    report = json.loads((tmp_path / "dense" / "report.json").read_text())
    assert report["bytes"]["targets_stored"] == report["bytes"]["targets_dense"]
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))
    plain = loaded.dequantize()
    assert not linear_experts(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert (logits(load(tmp_path / "plain")) - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("family", MIXTURES)
def test_taking_experts_apart_and_back(make_model, family):
    """Bit for bit, with equal outputs on the way."""
    model = load(make_model(family))
    expected, before = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    skeleton = empty_model(copy.deepcopy(model.config))
    linearise(skeleton)
    reader = ExpertReader(make_model(family), skeleton)
    names = checkpoint_names(skeleton, reader.names())
    read = dict(reader.read(list(names.values())))
    skeleton.load_state_dict({name: read[key] for name, key in names.items()}, assign=True)
    assert (logits(skeleton) - expected).abs().max() < 1e-5 * expected.abs().max()
    fuse(skeleton)
    assert skeleton.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in skeleton.state_dict().items())


def test_experts_that_are_left_out_stay_as_they_are(make_model, tmp_path):
    model = make_model("mixtral")
    result = compress_tiny(model, tmp_path / "out", ignore=["*.layers.0.*.experts.*", "*.experts.1.*"])
    stored = load_file(result.folder / "model.safetensors")
    dense = load(model).state_dict()
    fused = [name for name in dense if ".layers.0.mlp.experts." in name]
    assert len(fused) == 2
    assert all(torch.equal(stored[name], dense[name]) for name in fused)
    gate = dense["model.layers.1.mlp.experts.gate_up_proj"][1][:48]
    assert torch.equal(stored["model.layers.1.mlp.experts.1.gate_proj.weight"], gate)
    loaded = load(result.folder)
    assert list(linear_experts(loaded)) == ["model.layers.1.mlp.experts"]
    inspected = {t["name"]: t for t in inspect_model(str(result.folder), spectra=True)["targets"]}
    assert inspected["model.layers.0.mlp.experts.2.up_proj"]["format"] == "dense"
    values = torch.linalg.svdvals(dense["model.layers.0.mlp.experts.gate_up_proj"][2][48:].double())
    assert inspected["model.layers.0.mlp.experts.2.up_proj"]["spectrum"][0] == pytest.approx(float(values[0]))


def test_plain_transformers_refuses_them(make_model, mixture, tmp_path):
    """All compressed, or experts of one module partly: what is stored never loads as something else."""
    partly = [
        compress_tiny(make_model(family), tmp_path / family, ignore=["*.experts.1.*"])
        for family in ("mixtral", "qwen3_moe")
    ]
    folders = [result.folder for result in (*map(mixture, MIXTURES), *partly)]
    code = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("LOADED")
    except RuntimeError as error:
        print(str(error).splitlines()[0].replace(" ", "_"))
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=False)
    said = done.stdout.split()
    assert len(said) == len(folders), done.stderr[-2000:]
    assert all("ignore_mismatched_sizes" in line or "conversion" in line for line in said), said
