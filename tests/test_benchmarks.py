"""The benchmarks' own implementations, on tiny models."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.checkpoint.reader import CheckpointReader


def benchmark(name):
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_straightforward_implementation_is_optimal_in_the_whitened_norm(llama, tmp_path):
    """Every truncated product's output error on the calibration rows is the tail of the whitened singular values."""
    speed = benchmark("speed")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    layers = speed.targets(model)
    assert len(layers) == 21
    ids = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    grams = speed.gather(model, layers, ids)
    factors = speed.factorise(layers, grams, 0.6)
    for name, layer in layers.items():
        left, right = factors[f"{name}.u"], factors[f"{name}.v"]
        error = (layer.weight.detach() - left @ right).double()
        root = torch.linalg.cholesky(grams[name].double() + 1e-9 * torch.eye(len(grams[name])))
        tail = torch.linalg.svdvals(layer.weight.detach().double() @ root)[left.shape[1] :].square().sum()
        assert float(torch.trace(error @ grams[name].double() @ error.T)) == pytest.approx(float(tail), rel=1e-2)
    speed.straightforward(str(llama), tmp_path / "plain", 2, 64, 0.4)
    stored = load_file(tmp_path / "plain/model.safetensors")
    assert len([name for name in stored if name.endswith(".u")]) == 21
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


def test_rates_are_measured_for_every_operation():
    found = benchmark("speed").rates(48, 64)
    assert {"torch.matmul float64", "eigh float64", "cholesky float64", "svd float32"} <= found.keys()
    assert all(rate > 0 for rate in found.values())


def test_the_generated_checkpoint_is_an_ordinary_one(tmp_path):
    memory = benchmark("memory")
    folder = memory.generate(tmp_path / "random", 64, 128, 2, 300, shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    reader = CheckpointReader(folder)
    assert {reader.meta(name).dtype for name in reader.names()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("some words", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
