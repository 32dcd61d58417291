"""Entropy-coded weights through the whole way: sizes that are held, files that load, resume, processes of one step."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.errors import InputError
from lrcompress.formats.coded import Coded
from lrcompress.kernels.native import library
from lrcompress.pipeline import compress, make_plan
from tests.architectures import VOCABULARY
from tests.conftest import compress_tiny
from tests.test_pipeline import recipe


@pytest.mark.parametrize(
    "method", ["auto", "ecsq", {"name": "ecsq", "metric": "plain"}, {"name": "ecsq", "metric": "input"}]
)
@pytest.mark.parametrize("amount", [{"bpw": 4.0}, {"ratio": 0.7}])
def test_as_many_bits_are_stored_as_were_asked_for(llama, tmp_path, method, amount):
    result = compress_tiny(llama, tmp_path / "out", method=method, **{"ratio": None, **amount})
    report = result.report
    numbers = sum(t["shape"][0] * t["shape"][1] for t in report["targets"])
    tensors = load_file(result.folder / "model.safetensors")
    names = {t["name"] for t in report["targets"]}
    stored = sum(t.numel() * t.itemsize for name, t in tensors.items() if name.rpartition(".")[0] in names)
    assert report["bytes"]["targets_stored"] == stored
    assert report["ratio"]["bpw"] == pytest.approx(8 * stored / numbers)
    asked = 8 * stored / numbers / amount["bpw"] if "bpw" in amount else (1 - report["ratio"]["stored"]) / 0.3
    assert 0.985 < asked <= 1.0
    assert {t["format"] for t in report["targets"]} <= {"coded", "dense"}


def test_what_is_loaded_computes_with_integers_and_comes_back_from_saving(llama, tmp_path):
    folder = compress_tiny(llama, tmp_path / "out", method="auto", ratio=None, bpw=4.0).folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    coded = {name: module for name, module in model.named_modules() if isinstance(module, Coded)}
    assert set(coded) == set(read_manifest(folder).modules)
    for module in coded.values():
        assert module.stream is None
        assert (module.kernel(1) == "tiles") == (module.codes is None) == (library("tiles") is not None)
        held = sum(t.numel() * t.itemsize for t in [*module.parameters(), *module.buffers()])
        assert held < 0.6 * 2 * module.in_features * module.out_features + 64 * 256
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first if name.endswith((".stream", ".scales")))
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()
        torch.testing.assert_close(dense(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_more_bits_lose_less_and_the_sum_of_errors_follows_one_step(llama, tmp_path):
    errors = []
    for bits in (2.5, 4.0, 6.0):
        report = compress_tiny(llama, tmp_path / str(bits), method="auto", ratio=None, bpw=bits).report
        errors.append(sum(t["relative_error"] ** 2 for t in report["targets"]))
    assert errors[0] > 4 * errors[1] > 16 * errors[2] / 2


def test_a_plan_says_about_what_is_stored(llama, tmp_path):
    asked = {"method": "auto", "ratio": None, "bpw": 4.0}
    plan = make_plan(recipe(llama, **asked))
    report = compress_tiny(llama, tmp_path / "out", **asked).report
    assert plan["ratio"]["bpw"] == pytest.approx(report["ratio"]["bpw"], rel=0.01)
    assert (
        json.loads((tmp_path / "out" / "plan.json").read_text())["bytes"]["targets_stored"]
        == (report["bytes"]["targets_stored"])
    )


@pytest.mark.parametrize("propagation", ["one_pass", "sequential"])
def test_an_interrupted_run_ends_with_the_same_bytes(llama, tmp_path, monkeypatch, propagation):
    changes = {"method": {"name": "auto", "propagation": propagation}, "ratio": None, "bpw": 4.0}
    whole = compress_tiny(llama, tmp_path / "whole", **changes)
    from lrcompress.stages import lengths

    real, calls = lengths.encode_site, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyError("interrupted")
        return real(*arguments)

    monkeypatch.setattr(lengths, "encode_site", dies)
    with pytest.raises(KeyError):
        compress_tiny(llama, tmp_path / "out", **changes)
    compress(recipe(llama, output=str(tmp_path / "out"), **changes), resume=True)
    for path in whole.folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("bits", [0.4, 1.0])
def test_few_bits_are_kept_to_where_feedback_carries_much(tokenizer, tmp_path, bits):
    """Fewer tokens than inputs: even the coarsest step makes codes, and only zeros are as short as was planned."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    report = compress_tiny(tmp_path / "model", tmp_path / "out", method="auto", ratio=None, bpw=bits).report
    assert 0.8 * bits < report["ratio"]["bpw"] <= bits
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    sizes = {t["name"]: t["bytes"] for t in report["targets"]}
    for name, size in sizes.items():
        assert size == sum(t.numel() * t.itemsize for key, t in tensors.items() if key.rpartition(".")[0] == name)


def test_where_streams_are_longer_than_planned_the_amount_to_ask_for_is_said(llama, tmp_path, monkeypatch):
    from lrcompress.stages import lengths

    real = lengths.as_encoded

    def longer(spec, stored):
        found = real(spec, stored)
        return replace(found, parameters={**found.parameters, "length": 2000})

    monkeypatch.setattr(lengths, "as_encoded", longer)
    with pytest.raises(InputError, match="more than planned: ask for at least") as caught:
        compress_tiny(llama, tmp_path / "out", method="auto", ratio=None, bpw=4.0)
    weights = load_file(llama / "model.safetensors")
    shapes = [w.shape for name, w in weights.items() if name.startswith("model.layers") and w.dim() == 2]
    stored = sum(Coded.beside(tuple(shape)) + 2000 for shape in shapes)
    numbers = sum(shape.numel() for shape in shapes)
    bits = float(re.search(r"([0-9.]+) bits a weight", str(caught.value)).group(1))
    assert bits - 0.01 < 8 * stored / numbers <= bits
    ratio = float(re.search(r"at most ([0-9.]+)$", str(caught.value)).group(1))
    assert ratio <= 1 - stored / (4 * numbers) < ratio + 1e-4
    kilobytes = int(re.search(r"for (\d+)KB", str(caught.value)).group(1))
    assert 1000 * kilobytes >= stored + sum(4 * w.numel() for w in weights.values()) - 4 * numbers
    assert not (tmp_path / "out").exists()


def test_bits_that_cannot_be_reached_and_joins_are_refused(llama, tmp_path):
    with pytest.raises(InputError, match=r"--bpw 40 cannot be reached"):
        compress_tiny(llama, tmp_path / "out", method="auto", ratio=None, bpw=40.0)
    with pytest.raises(InputError, match="bpw 3.0 and size 1MB were both asked"):
        recipe(llama, method="auto", ratio=None, bpw=3.0, size="1MB")
    with pytest.raises(InputError, match="join=auto is of low-rank weights"):
        compress_tiny(llama, tmp_path / "out", method={"name": "auto", "join": "auto"})
    assert not (tmp_path / "out").exists()
