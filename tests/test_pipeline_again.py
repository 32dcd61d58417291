"""Compressed checkpoints compressed further, without the dense model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.errors import InputError
from lrcompress.linalg.truncation import decompose
from lrcompress.model.surgery import dense_parts, stored_layers
from lrcompress.pipeline import make_plan
from lrcompress.recipe import make_recipe
from tests.conftest import compress_tiny

PLAIN = {"method": {"name": "lord", "metric": "plain"}}


def layers(folder):
    return stored_layers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize(("architecture", "format"), [("llama", "low_rank"), ("gpt2", "pivoted")])
def test_every_weight_is_the_best_approximation_of_the_first(compressed, tmp_path, architecture, format):
    first = compressed(architecture, **PLAIN, format=format)
    result = compress_tiny(first, tmp_path / "out", **PLAIN, ratio=0.5)
    before, after = layers(first), layers(tmp_path / "out")
    assert before.keys() == after.keys()
    for target in result.report["targets"]:
        name = target["name"]
        weight = dense_parts(before[name])[0].double()
        u, s, vt = torch.linalg.svd(weight)
        rank = target["rank"]
        assert rank < before[name].spec.rank
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        torch.testing.assert_close(dense_parts(after[name])[0].double(), best, rtol=1e-4, atol=1e-4)
        lost = float((s[rank:].square().sum() / s.square().sum()) ** 0.5)
        assert target["relative_error"] == pytest.approx(lost, rel=1e-4)
    dense, original = (
        r["bytes"]["targets_dense"] for r in (result.report, json.loads((first / "report.json").read_text()))
    )
    assert dense == original
    assert result.report["ratio"]["stored"] == 1 - result.report["bytes"]["targets_stored"] / dense
    assert 0.5 <= result.report["ratio"]["stored"] < 0.53
    assert read_manifest(tmp_path / "out").modules.keys() == read_manifest(first).modules.keys()


@pytest.mark.parametrize(
    ("metric", "propagation"), [("input", "one_pass"), ("centred", "sequential"), ("two_sided", "one_pass")]
)
def test_statistics_come_from_the_compressed_model(compressed, tmp_path, metric, propagation):
    """The first block's inputs are the same either way; its errors are those of a dense decomposition on them."""
    first = compressed(method={"name": "lord", "metric": "centred"})
    method = {"name": "lord", "metric": metric, "propagation": propagation}
    report = compress_tiny(first, tmp_path / "out", method=method, ratio=0.5).report
    before, after = layers(first), layers(tmp_path / "out")
    assert all(layer.spec.added_bias for layer in after.values())
    gram = _first_gram(first, centred=metric == "centred")
    for kind in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{kind}"
        if metric == "two_sided":
            continue
        target = next(t for t in report["targets"] if t["name"] == name)
        weight = dense_parts(before[name])[0]
        energies = decompose(weight, gram).energies
        lost = float((energies[target["rank"] :].sum() / energies.sum()) ** 0.5)
        assert target["relative_error"] == pytest.approx(lost, rel=1e-3)
        moved = weight.double() - dense_parts(after[name])[0].double()
        assert float((moved @ gram * moved).sum() / energies.sum()) ** 0.5 == pytest.approx(lost, rel=1e-3)
        if metric == "input":
            torch.testing.assert_close(after[name].dense_bias(), before[name].dense_bias(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _first_gram(folder, centred):
    """Of the inputs of the first attention, gathered by a hook on the loaded compressed model."""
    from transformers import AutoTokenizer

    from lrcompress.calibration.collect import token_weights
    from lrcompress.calibration.corpus import parse_source
    from lrcompress.calibration.drawing import calibration_blocks

    ids = calibration_blocks(
        [(parse_source("python-docs"), 4, 64)], AutoTokenizer.from_pretrained(folder), 0, folder
    ).ids
    model, rows = AutoModelForCausalLM.from_pretrained(folder), []
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].double()))
    for sample in ids:
        model(input_ids=sample[None])
    weights, x = token_weights(64, 0.125).double().repeat(4), torch.cat(rows)
    mean = weights @ x / weights.sum()
    gram = (x * weights[:, None]).T @ x / weights.sum()
    return gram - torch.outer(mean, mean) if centred else gram


def test_what_need_not_change_stays_bit_for_bit(compressed, tmp_path):
    first = compressed(method={"name": "lord", "metric": "centred"}, dtype="bfloat16")
    recipe = {"method": "lord", "allocator": "marginal_error", "ratio": 0.23}
    report = compress_tiny(first, tmp_path / "out", **recipe).report
    before, after = (read_manifest(folder).modules for folder in (first, tmp_path / "out"))
    kept = [name for name, spec in before.items() if after[name] == spec]
    assert 0 < len(kept) < len(before)
    tensors = [load_file(folder / "model.safetensors") for folder in (first, tmp_path / "out")]
    for name in tensors[0]:
        if name.startswith(tuple(f"{module}." for module in kept)) or name not in tensors[1]:
            continue
        if not name.startswith(tuple(f"{module}." for module in before)):
            assert torch.equal(tensors[0][name], tensors[1][name])
    for module in kept:
        for name in (n for n in tensors[0] if n.startswith(f"{module}.")):
            assert torch.equal(tensors[0][name], tensors[1][name])
    assert {t["relative_error"] for t in report["targets"] if t["name"] in kept} == {0.0}
    assert 0.23 <= report["ratio"]["stored"] < 0.24


def test_weights_that_were_dense_are_targets_too(compressed, tmp_path):
    first = compressed(**PLAIN, target=["*.mlp.*"])
    plan = make_plan(
        make_recipe({"model": str(first), **PLAIN, "ratio": 0.4, "calibration": {"samples": 1, "seqlen": 32}})
    )
    assert len(plan["targets"]) == 21
    assert plan["bytes"]["targets_stored"] <= 0.6 * plan["bytes"]["targets_dense"]
    compress_tiny(first, tmp_path / "out", **PLAIN, allocator="welore", ratio=0.4)
    assert any("self_attn" in name for name in layers(tmp_path / "out"))


def test_a_size_is_reached(compressed, tmp_path):
    first = compressed()
    size = sum(path.stat().st_size for path in first.glob("*.safetensors")) - 9000
    again = compress_tiny(first, tmp_path / "out", ratio=None, size=str(size)).folder
    assert size - 1500 < sum(path.stat().st_size for path in again.glob("*.safetensors")) <= size


def test_what_is_refused(compressed, tmp_path):
    first = compressed()
    for model, recipe, message in (
        (first, {"ratio": 0.15}, "0.20.* removed already"),
        (first, {"method": "cospadi", "ratio": 0.5}, "lord and welore compress it further"),
        (first, {"method": "auto", "ratio": 0.5}, "auto with --format"),
        (first, {"method": {"name": "eora"}, "ratio": 0.5}, "start from the dense model"),
        (first, {"ratio": 0.5, "ratio_of": "rank"}, "ratio_of, max_loss"),
        (first, {"ratio": None, "max_loss": "2%"}, "ratio_of, max_loss"),
        (first, {"ratio": 0.5, "target": ["*.mlp.*"]}, "is no target here"),
        (first, {"ratio": 0.9999}, "at most"),
        (compressed(method="cospadi"), {"ratio": 0.5}, "as sparse_dictionary.*dense checkpoint"),
        (compressed(method="eora", base="rtn:4:16", ratio=None, rank=2), {"ratio": 0.9}, "as sum"),
    ):
        with pytest.raises(InputError, match=message):
            compress_tiny(model, tmp_path / "out", **recipe)
    assert not list(tmp_path.iterdir())


def test_auto_with_a_format(compressed, tmp_path):
    first = compressed()
    report = compress_tiny(first, tmp_path / "out", method="auto", format="pivoted", ratio=0.5).report
    assert {t["format"] for t in report["targets"]} <= {"pivoted"}
