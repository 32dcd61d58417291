"""Every family of causal language models goes through compress, write, load and generate; experts in detail."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lrcompress.model.experts import LinearExperts, linear_experts
from lrcompress.model.surgery import dense_parts, stored_layers
from tests.architectures import FAMILIES
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
