"""Compressed checkpoints through transformers: real files, real processes."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.errors import InputError
from lrcompress.formats import StoredLinear
from lrcompress.formats.base import KernelLinear
from lrcompress.model.surgery import dense_parts, stored_layers
from tests.conftest import ARCHITECTURES, WITHOUT_PTH, compress_tiny

METHODS = [
    ("lord", "auto"),
    ("lord", "low_rank"),
    ("welore", "auto"),
    ("welore", "pivoted"),
    ("cospadi", "sparse_dictionary"),
    ("auto", "auto"),
]


def load(folder, **kwargs):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


IDS = torch.arange(2, 42).reshape(2, 20)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("method", "form"), METHODS)
def test_loaded_equals_the_dense_model_with_the_formats_put_in_place(
    make_model, compressed, architecture, method, form
):
    folder = compressed(architecture, method=method, format=form)
    model = load(folder)
    reference = load(make_model(architecture))
    replaced = 0
    for name, module in stored_layers(model).items():
        layer = reference.get_submodule(name)
        weight, bias = dense_parts(module)
        layer.weight.data = weight.T if module.spec.conv1d else weight
        layer.bias = None if bias is None else torch.nn.Parameter(bias)
        replaced += 1
    assert replaced >= 3
    torch.testing.assert_close(logits(model, IDS), logits(reference, IDS), rtol=1e-3, atol=1e-3)
    out = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 23)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_pretrained_round_trip_and_dequantize(compressed, architecture, tmp_path):
    folder = compressed(architecture)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(model, IDS), logits(again, IDS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = load(folder).dequantize()
    assert not any(isinstance(m, StoredLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense, IDS), logits(model, IDS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dequantized_model_is_an_ordinary_checkpoint(compressed, architecture, tmp_path):
    dense = load(compressed(architecture, method="welore")).dequantize()
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path / "dense"), IDS), logits(dense, IDS))


def test_biases_without_a_place_in_the_architecture_are_announced(compressed):
    with pytest.warns(UserWarning, match="would lose them"):
        load(compressed("llama")).dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_at_load(compressed, dtype):
    model = load(compressed(), dtype=dtype)
    factors = [p for m in model.modules() if isinstance(m, StoredLinear) for p in m.parameters()]
    assert {p.dtype for p in factors} == {dtype}
    assert torch.isfinite(logits(model, IDS)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stayed_dense_is_multiplied_by_our_kernels(compressed, dtype):
    model = load(compressed(), dtype=dtype)
    head = model.get_output_embeddings()
    assert type(head) is KernelLinear
    for rows in (1, 3, 300):
        x = torch.randn(rows, head.in_features, dtype=dtype)
        torch.testing.assert_close(head(x), torch.nn.functional.linear(x, head.weight), rtol=2**-7, atol=1e-5)
    x = torch.randn(2, head.in_features, dtype=dtype, requires_grad=True)
    head(x).sum().backward()
    torch.testing.assert_close(head.weight.grad, x.detach().sum(0).expand_as(head.weight), rtol=2**-7, atol=2**-7)
    dense = model.dequantize()
    assert not [name for name, module in dense.named_modules() if isinstance(module, KernelLinear)]


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(compressed, device_map):
    assert torch.equal(logits(load(compressed(), device_map=device_map), IDS), logits(load(compressed()), IDS))


LAYOUT = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
          "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}  # fmt: skip
OFFLOADED = {
    "a block": {"device_map": LAYOUT},
    "a block and its buffers": {"device_map": LAYOUT, "offload_buffers": True},
    "everything": {"device_map": {"": "disk"}},
    "what does not fit": {"device_map": "auto", "max_memory": {"cpu": "90KB"}},
}
STORED = {
    "lord": {},
    "auto": {"method": "auto", "target": ["lm_head", "model.layers.*"]},
    "sharing a dictionary": {"method": {"name": "cospadi", "group": 2}, "format": "sparse_dictionary"},
    "an entropy coder": {"method": "ecsq", "format": "coded", "ratio": 0.6},
    "eora": {"method": "eora", "format": "sum", "base": "rtn:4:32", "ratio": 0.5},
}


@pytest.mark.parametrize("how", OFFLOADED)
@pytest.mark.parametrize("recipe", STORED)
def test_offload_to_disk(compressed, tmp_path, recipe, how):
    folder = compressed(**STORED[recipe])
    model = load(folder, offload_folder=str(tmp_path), **OFFLOADED[how])
    assert any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model, IDS), logits(load(folder), IDS))


def test_what_is_offloaded_is_not_multiplied_out(compressed, tmp_path):
    """Without its numbers it would be another model."""
    model = load(compressed("gpt2"), device_map={"": "disk"}, offload_folder=str(tmp_path))
    with pytest.raises(InputError, match="is offloaded, .* load the model without a device_map"):
        model.dequantize()
    torch.testing.assert_close(logits(model, IDS), logits(load(compressed("gpt2")), IDS))


def test_factors_train(compressed):
    model = load(compressed())
    model(input_ids=IDS, labels=IDS).loss.backward()
    factors = [p for m in model.modules() if isinstance(m, StoredLinear) for p in m.parameters()]
    assert all(p.requires_grad and p.grad is not None for p in factors)


def test_tied_embeddings_stay_tied(compressed):
    model = load(compressed("qwen3"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any("lm_head" in n for n in load_file(compressed("qwen3") / "model.safetensors"))


def test_many_shards_in_and_out(make_model, tmp_path):
    whole = compress_tiny(make_model("llama"), tmp_path / "whole")
    parts = compress_tiny(make_model("llama", shards=True), tmp_path / "parts", shard_size="30KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert whole.report["bytes"] == parts.report["bytes"]
    assert torch.equal(logits(load(tmp_path / "whole"), IDS), logits(load(tmp_path / "parts"), IDS))


@pytest.mark.parametrize("first", ["lrcompress", "transformers, peft"])
def test_the_order_of_imports_does_not_matter(compressed, first):
    """To transformers, which then loads our formats, and to PEFT, whose layers then ask before they merge."""
    second = {"lrcompress": "transformers, peft", "transformers, peft": "lrcompress"}[first]
    code = f"""{WITHOUT_PTH}
import {first}
import {second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(compressed())!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
import peft.tuners.lora.layer as l
print(l.Linear.merge.__globals__["__name__"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Pivoted", "lrcompress.checkpoint.peft_integration"]


def test_other_versions_of_transformers_load_without_us(tmp_path):
    """A probe for the module changes nothing; that ours cannot be registered is a warning, for programs without us."""
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    code = f"""{WITHOUT_PTH}
import importlib.util
sys.path.insert(0, {str(tmp_path)!r})
import lrcompress
assert importlib.util.find_spec("transformers.quantizers") is not None
import transformers.quantizers
print(transformers.quantizers.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(package / "__init__.py")]
    assert "lrcompress cannot load its checkpoints here" in done.stderr


def test_the_folder_is_complete(compressed):
    folder = compressed()
    AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "import lrcompress" in (folder / "README.md").read_text()
    assert not list(folder.parent.glob("*.partial"))
    assert not (folder / "scratch").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"modules": 3}, "lists no modules"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"format": "pivoted"}}}, "malformed"),
        ({"modules": {"model.layers.0.mlp.up_proj": {"format": "x", "shape": [48, 32]}}}, "unknown format"),
        ({"modules": {"nowhere": {"format": "low_rank", "shape": [4, 4], "rank": 2}}}, "names nowhere"),
        (
            {"modules": {"model.layers.0.mlp.up_proj": {"format": "low_rank", "shape": [10**9, 32], "rank": 2}}},
            "makes it",
        ),
        ({"modules": {"model.layers.0.mlp.up_proj": {"format": "low_rank", "shape": [48, 32], "rank": 10**9}}}, "rank"),
    ],
)
def test_a_wrong_manifest_is_refused_before_anything_is_allocated(compressed, tmp_path, change, message):
    for path in compressed().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_welore_marks_dense_weights_frozen(compressed):
    config = json.loads((compressed("llama", method="welore") / "config.json").read_text())["quantization_config"]
    report = json.loads((compressed("llama", method="welore") / "report.json").read_text())
    dense = {t["name"] for t in report["targets"] if t["format"] == "dense"}
    assert set(config["frozen"]) == dense
    assert not set(config["modules"]) & dense
