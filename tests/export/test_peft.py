"""Corrections as a LoRA adapter over the base alone: equal to the sums, through PEFT itself."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.errors import InputError
from lrcompress.export.peft import export_peft
from lrcompress.model.surgery import stored_layers
from lrcompress.report.inspection import inspect_model
from tests.checkpoint.test_loading import IDS, load, logits

# base, bits of the factors, metric
CASES = [("rtn:3:16", 16, "input"), ("gptq:4:16", 8, "centred"), ("magnitude:2:4", 4, "centred"),
         ("wanda:2:4", 16, "centred"), ("rtn:2:7", 8, "plain")]  # fmt: skip
EXACT = {"rtol": 1e-5, "atol": 1e-5}
"""In float32 the sums y = base + correction + bias are only added in another order."""


def eora(base="rtn:3:16", bits=16, metric="input", **more):
    """A recipe; without a rank the allocator gives every layer its own."""
    amount = {} if "ratio" in more else {"ratio": None, "rank": 3}
    return {"method": {"name": "eora", "factor_bits": bits, "metric": metric}, "base": base, **amount, **more}


@pytest.fixture
def export(tmp_path):
    def run(folder, **options):
        result = export_peft(str(folder), tmp_path / "adapter", **options)
        assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
        return tmp_path / "adapter", result

    return run


def assembled(folder):
    return PeftModel.from_pretrained(load(folder / "base"), folder).eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "opt"])
@pytest.mark.parametrize(("base", "bits", "metric"), CASES)
def test_base_and_adapter_are_equal_to_the_checkpoint(compressed, export, recwarn, architecture, base, bits, metric):
    source = compressed(architecture, **eora(base, bits, metric))
    expected = logits(load(source), IDS)
    folder, result = export(source)
    model = assembled(folder)
    torch.testing.assert_close(logits(model, IDS), expected, **EXACT)
    assert not [w for w in recwarn if "peft" in w.filename]
    with model.disable_adapter():
        assert not torch.allclose(logits(model, IDS), expected, atol=1e-2)
    layers = {"llama": 21, "gpt2": 12, "qwen3": 21, "opt": 18}[architecture]
    assert result["layers"] == layers
    assert result["ranks"] == [8, 8]
    assert not any(module.spec.format == "sum" for module in stored_layers(load(folder / "base")).values())
    assert len(stored_layers(load(folder / "base"))) == layers


def test_unequal_ranks_meet_exactly_their_layers(compressed, export):
    """The allocator gives many layers a rank of their own, and some none."""
    source = compressed(**eora("rtn:2:16", ratio=0.6))
    specs = read_manifest(source).modules
    ranks = {name: spec.rank for name, spec in specs.items() if spec.format == "sum"}
    assert len(set(ranks.values())) > 3
    folder, result = export(source, per_module_ranks=True)
    model = assembled(folder)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            found[name] = module.r["default"]
            assert module.scaling["default"] == 1.0
    assert found == ranks
    assert result["ranks"] == [min(ranks.values()), max(ranks.values())]
    torch.testing.assert_close(logits(model, IDS), logits(load(source), IDS), **EXACT)


def test_layers_without_a_correction_are_not_in_the_adapter(compressed, export):
    source = compressed(**eora(target=["*.mlp.*"]))
    folder, result = export(source)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        f"model.layers.{i}.mlp.{n}_proj" for i in range(3) for n in ("gate", "up", "down")
    }
    assert result["layers"] == 9
    torch.testing.assert_close(logits(assembled(folder), IDS), logits(load(source), IDS), **EXACT)


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.bfloat16), (8, torch.float32), (4, torch.float32)])
def test_factors_keep_their_numbers(compressed, export, bits, dtype):
    """Stored numbers keep the checkpoint's dtype, codes come out in float32: exact either way."""
    source = compressed(**eora(bits=bits, dtype="bfloat16"))
    folder, result = export(source)
    stored = load_file(folder / "adapter_model.safetensors")
    assert result["dtypes"] == [str(dtype).removeprefix("torch.")]
    assert {t.dtype for t in stored.values()} == {dtype}
    for name, module in stored_layers(load(source, dtype=torch.float32)).items():
        left, right = module.factors()
        b, a = (stored[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "BA")
        assert torch.equal(b[:, :3], left)
        assert torch.equal(a[:3], right)
        assert (b.shape[1], a.shape[0]) == (8, 8)
        assert not b[:, 3:].any()
        assert not a[3:].any()
    model = PeftModel.from_pretrained(load(folder / "base", dtype=torch.float32), folder)
    torch.testing.assert_close(logits(model, IDS), logits(load(source, dtype=torch.float32), IDS), **EXACT)


@pytest.mark.parametrize(("base", "bits", "metric"), CASES[:3])
def test_the_base_keeps_every_bit(compressed, export, base, bits, metric):
    source = compressed(**eora(base, bits, metric, dtype="bfloat16"))
    before, after = load_file(source / "model.safetensors"), load_file(export(source)[0] / "base/model.safetensors")
    modules = read_manifest(source).modules
    for name, tensor in after.items():
        module, _, key = name.rpartition(".")
        inner = module in modules and key not in ("weight", "bias")
        same = before[f"{module}.base.{key}" if inner else name]
        assert tensor.dtype == same.dtype
        assert torch.equal(tensor, same)
    dropped = {"A.weight", "B.weight"} if bits == 16 else {"A_codes", "B_codes", "scale"}
    assert len(before) == len(after) + len(modules) * len(dropped)


def test_the_base_is_an_ordinary_checkpoint_of_ours_with_an_honest_report(compressed, export):
    source = compressed(**eora("gptq:4:16", metric="centred"))
    report = json.loads((source / "report.json").read_text())
    report["evaluation"] = {"results": {}}
    (source / "report.json").write_text(json.dumps(report))
    base = export(source, shard_size="20KB")[0] / "base"
    assert len(list(base.glob("*.safetensors"))) > 3
    AutoTokenizer.from_pretrained(base)
    written = json.loads((base / "report.json").read_text())
    seen = inspect_model(str(base))
    assert written["bytes"] == seen["bytes"]
    assert {t["name"]: t["bytes"] for t in written["targets"]} == {t["name"]: t["bytes"] for t in seen["targets"]}
    assert {(t["format"], t["rank"], t["relative_error"]) for t in written["targets"]} == {("quantized", 0, None)}
    assert written["ratio"]["stored"] > report["ratio"]["stored"]
    saved = report["bytes"]["checkpoint"] - written["bytes"]["checkpoint"]
    dense = report["bytes"]["checkpoint"] / (1 - report["ratio"]["whole_model"])
    assert written["ratio"]["whole_model"] == pytest.approx(report["ratio"]["whole_model"] + saved / dense)
    assert written["ratio"]["asked"] is None
    assert "evaluation" not in written
    assert written["calibration"] == report["calibration"]
    assert not (base / "recipe.yaml").exists()
    assert "without its corrections" in (base / "README.md").read_text()
    with pytest.raises(InputError, match="no correction to export"):
        export_peft(str(base), base.parent.parent / "again")


def test_transformers_and_peft_find_the_base_by_the_adapter(compressed, export):
    source = compressed(**eora())
    folder, _ = export(source)
    expected = logits(load(source), IDS)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(folder), IDS), expected, **EXACT)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder), IDS), expected, **EXACT)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_over_the_dense_base(compressed, export, architecture):
    source = compressed(architecture, **eora())
    folder, _ = export(source)
    with pytest.raises(InputError, match="dequantize"):
        assembled(folder).merge_and_unload()
    merged = PeftModel.from_pretrained(load(folder / "base").dequantize(), folder).merge_and_unload()
    torch.testing.assert_close(logits(merged, IDS), logits(load(source), IDS), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_without_corrections_is_refused(compressed, llama, tmp_path):
    for folder, message in (
        (compressed(), "none of its 21 compressed weights is a sum.*eora.*--to dense"),
        (compressed(**eora(rank=0)), "none of its 21"),
        (llama, "not compressed by lrcompress"),
    ):
        with pytest.raises(InputError, match=message):
            export_peft(str(folder), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_refused(compressed, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in compressed(**eora()).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.A.weight")
    for wrong in ({}, {"model.layers.1.mlp.up_proj.A.weight": lost[:1].clone()}):
        save_file(tensors | wrong, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match="no tensor model.layers.1.mlp.up_proj.A.weight of shape"):
            export_peft(str(source), tmp_path / "out")
    broken = {"model.layers.1.mlp.up_proj.A.weight": lost * float("nan")}
    save_file(tensors | broken, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="non-finite"):
        export_peft(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_folder_in_use_is_kept_and_the_source_never_replaced(compressed, tmp_path):
    source, used = compressed(**eora()), tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        export_peft(str(source), used)
    assert (used / "mine.txt").exists()
    export_peft(str(source), used, overwrite=True)
    assert not (used / "mine.txt").exists()
    for output in (source, source.parent):
        with pytest.raises(InputError, match="which is read"):
            export_peft(str(source), output, overwrite=True)
    assert (source / "model.safetensors").exists()
