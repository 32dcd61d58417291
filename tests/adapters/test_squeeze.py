"""Squeezed adapters through PEFT, against dense truncations of what it adds."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrcompress.adapters.inputs import Inputs
from lrcompress.adapters.squeeze import Amount, squeeze
from lrcompress.errors import InputError
from lrcompress.linalg.truncation import decompose
from lrcompress.recipe import CalibrationSpec
from tests.adapters.conftest import deltas, embedding_delta, logits
from tests.commands import run_cli


def best(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    "regex": {"target_modules": r".*layers\.[02]\..*(gate|up)_proj"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_update_is_its_best_approximation(make_adapter, load_adapter, tmp_path, config):
    source = make_adapter(**config)
    report = squeeze(str(source), tmp_path / "out", Amount(rank=3, per_module=True))
    before, after = deltas(load_adapter(source)), deltas(load_adapter(tmp_path / "out"))
    assert before.keys() == after.keys()
    ranks = {module["name"]: module["rank"] for module in report["modules"]}
    assert ranks.keys() == before.keys()
    assert sum(ranks.values()) == 3 * len(ranks)
    assert len(set(ranks.values())) > 1
    for name, update in before.items():
        torch.testing.assert_close(after[name], best(update, ranks[name]), rtol=1e-5, atol=1e-6)
    # No other choice of ranks with this sum errs less: the components kept are the largest of all, one each at least.
    values = {name: torch.linalg.svdvals(update) for name, update in before.items()}
    least_kept = min(v[ranks[name] - 1] for name, v in values.items() if ranks[name] > 1)
    assert max(v[ranks[name]] for name, v in values.items()) <= least_kept
    lost = sum(float((before[n] - after[n]).square().sum()) for n in before)
    total = sum(float(update.square().sum()) for update in before.values())
    assert report["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    for module in report["modules"]:
        update, name = before[module["name"]], module["name"]
        assert module["relative_error"] == pytest.approx(
            float((update - after[name]).norm() / update.norm()), rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(make_adapter, load_adapter, tmp_path, dtype):
    source = make_adapter(dtype=dtype)
    squeeze(str(source), tmp_path / "out", Amount(rank=4))
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {dtype}
    before, after = deltas(load_adapter(source)), deltas(load_adapter(tmp_path / "out"))
    for name, update in before.items():
        torch.testing.assert_close(after[name], best(update, 4), rtol=0.02, atol=0.02)


def test_ratio_counts_the_bytes_that_are_written(make_adapter, tmp_path):
    source = make_adapter()
    report = squeeze(str(source), tmp_path / "out", Amount(ratio=0.5, per_module=True))
    stored = [load_file(f / "adapter_model.safetensors") for f in (source, tmp_path / "out")]
    before, after = (sum(t.numel() * t.itemsize for t in tensors.values()) for tensors in stored)
    assert report["bytes"] == {"before": before, "after": after, "carried": 0}
    assert 0.5 <= 1 - after / before < 0.51
    assert report["ratio"] == pytest.approx(1 - after / before)


def test_error_is_met_with_nothing_to_spare(make_adapter, load_adapter, tmp_path):
    source = make_adapter()
    report = squeeze(str(source), tmp_path / "out", Amount(error=0.3, per_module=True))
    before, after = deltas(load_adapter(source)), deltas(load_adapter(tmp_path / "out"))
    total = sum(float(update.square().sum()) for update in before.values())
    lost = sum(float((before[n] - after[n]).square().sum()) for n in before)
    assert (lost / total) ** 0.5 <= 0.3
    ranks = {module["name"]: module["rank"] for module in report["modules"]}
    last = min(float(torch.linalg.svdvals(before[n])[r - 1] ** 2) for n, r in ranks.items() if r > 1)
    largest = max(float(torch.linalg.svdvals(before[n])[r - 1] ** 2) for n, r in ranks.items() if r > 1)
    assert lost + largest > 0.09 * total
    assert last > 0


def test_randomised_is_nearly_as_good(make_adapter, load_adapter, tmp_path):
    source = make_adapter(r=16, decay=0.95)
    exact = squeeze(str(source), tmp_path / "exact", Amount(rank=3, per_module=True))
    found = squeeze(str(source), tmp_path / "out", Amount(rank=3, per_module=True), randomised_seed=1)
    before, after = deltas(load_adapter(source)), deltas(load_adapter(tmp_path / "out"))
    total = sum(float(update.square().sum()) for update in before.values())
    lost = sum(float((before[n] - after[n]).square().sum()) for n in before)
    assert found["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert (1 - 1e-9) * exact["relative_error"] <= found["relative_error"] <= 1.02 * exact["relative_error"]


def test_inputs_of_the_adapted_model_weigh_errors(make_adapter, load_adapter, llama, tmp_path):
    source = make_adapter(target_modules=["k_proj", "up_proj", "down_proj", "lm_head"])
    inputs = Inputs(str(llama), [CalibrationSpec(samples=3, seqlen=48)])
    report = squeeze(str(source), tmp_path / "out", Amount(rank=3), inputs=inputs)
    squeeze(str(source), tmp_path / "plain", Amount(rank=3))
    model, before = load_adapter(source), deltas(load_adapter(source))
    after, plain = deltas(load_adapter(tmp_path / "out")), deltas(load_adapter(tmp_path / "plain"))
    grams = _grams(model, llama, before)
    assert report["metric"] == "input"
    for module in report["modules"]:
        name = module["name"]
        gram, spectrum = grams[name], decompose(before[name], grams[name])
        errors = [_squared(before[name] - found[name], gram) for found in (after, plain)]
        assert errors[0] == pytest.approx(float(spectrum.errors()[3]), rel=1e-3)
        assert errors[0] < errors[1]
        total = _squared(before[name], gram)
        assert module["relative_error"] == pytest.approx((errors[0] / total) ** 0.5, rel=1e-3)


def _squared(matrix, gram):
    return float((matrix @ gram * matrix).sum())


@torch.no_grad()
def _grams(model, folder, names):
    """Second moments of the inputs, gathered by hooks on PEFT's model, first tokens weighed as the calibration does."""
    from transformers import AutoTokenizer

    from lrcompress.calibration.collect import token_weights
    from lrcompress.calibration.corpus import parse_source
    from lrcompress.calibration.drawing import calibration_blocks

    ids = calibration_blocks(
        [(parse_source("python-docs"), 3, 48)], AutoTokenizer.from_pretrained(folder), 0, folder
    ).ids
    weights = token_weights(48, 0.125).double()
    rows = {name: [] for name in names}
    for name in names:
        module = model.base_model.model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0][0].double()))
    for sample in ids:
        model(input_ids=sample[None])
    return {
        name: sum((x * weights[:, None]).T @ x for x in found) / (3 * weights.sum()) for name, found in rows.items()
    }


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj", "v_proj"], "use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
    ],
    ids=["embeddings", "modules", "biases"],
)
def test_what_is_no_update_of_a_linear_layer_is_kept(make_adapter, load_adapter, tmp_path, config):
    source = make_adapter(**config)
    report = squeeze(str(source), tmp_path / "out", Amount(error=1e-7))
    before, after = (
        load_file(source / "adapter_model.safetensors"),
        load_file(tmp_path / "out/adapter_model.safetensors"),
    )
    assert report["carried"]
    assert (
        sum(t.numel() * t.itemsize for n, t in before.items() if n in report["carried"]) == report["bytes"]["carried"]
    )
    assert before.keys() == after.keys()
    torch.testing.assert_close(
        logits(load_adapter(tmp_path / "out")), logits(load_adapter(source)), rtol=1e-4, atol=1e-4
    )


TIED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "a regex": {"target_modules": r".*(embed_tokens|v_proj)"},
    "a rank of its own": {"rank_pattern": {"embed_tokens": 5}},
    "other scalings": {"alpha_pattern": {"lm_head": 3}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", TIED.values(), ids=TIED)
def test_an_update_of_tied_embeddings_stays_one(make_adapter, load_adapter, tmp_path, config, dtype):
    """PEFT holds the factors of embeddings and head as one (ensure_weight_tying), each with a scaling of its own."""
    defaults = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    source = make_adapter(architecture="qwen3", **{**defaults, **config})
    path = source / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    two_scalings = "alpha_pattern" in config or "rank_pattern" in config
    if two_scalings:
        with pytest.raises(InputError, match=r"lm_head .* two numbers.*--per-module-ranks"):
            squeeze(str(source), tmp_path / "out", Amount(rank=3))
    amount = Amount(rank=3, per_module=two_scalings)
    report = squeeze(str(source), tmp_path / "out", amount)
    ranks = {module["name"]: module["rank"] for module in report["modules"]}
    before, after = (load_adapter(folder, "qwen3") for folder in (source, tmp_path / "out"))
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    wanted = best(embedding_delta(before), ranks["lm_head"])
    torch.testing.assert_close(embedding_delta(after), wanted, **near)
    for name, update in deltas(before).items():
        torch.testing.assert_close(deltas(after)[name], best(update, ranks[name]), **near)
    files = [load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "out")]
    assert files[0].keys() == files[1].keys()
    sizes = [
        sum(t.nbytes for name, t in tensors.items() if "lora_" in name and "bias" not in name) for tensors in files
    ]
    assert [report["bytes"]["before"], report["bytes"]["after"]] == sizes


def test_a_tied_update_that_keeps_everything_is_the_same(make_adapter, load_adapter, tmp_path):
    source = make_adapter(architecture="qwen3", target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True)
    squeeze(str(source), tmp_path / "out", Amount(error=1e-7))
    found, wanted = (logits(load_adapter(folder, "qwen3")) for folder in (tmp_path / "out", source))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5, 8], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ],
    ids=["whole modules", "tokens", "apart"],
)
def test_what_else_is_tied_is_kept(make_adapter, load_adapter, tmp_path, config):
    """A pair that PEFT trains apart stays two updates."""
    source = make_adapter(architecture="qwen3", **config)
    squeeze(str(source), tmp_path / "out", Amount(error=1e-7))
    found, wanted = (logits(load_adapter(folder, "qwen3")) for folder in (tmp_path / "out", source))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_tied_pair_that_was_trained_apart_is_kept(make_adapter, load_adapter, tmp_path):
    """As PEFT does it in half precision; it still wants one rank for both."""
    source = make_adapter(architecture="qwen3", target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True)
    path = source / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.lora_A.weight"] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"keeps its rank 8.*--per-module-ranks"):
        squeeze(str(source), tmp_path / "out", Amount(rank=3))
    report = squeeze(str(source), tmp_path / "out", Amount(rank=3, per_module=True))
    assert {module["name"].rpartition(".")[2] for module in report["modules"]} == {"v_proj"}
    squeeze(str(source), tmp_path / "same", Amount(error=1e-7))
    found, wanted = (logits(load_adapter(folder, "qwen3")) for folder in (tmp_path / "same", source))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    before, after = (load_adapter(folder, "qwen3") for folder in (source, tmp_path / "out"))
    torch.testing.assert_close(embedding_delta(after), embedding_delta(before))
    torch.testing.assert_close(deltas(after)["lm_head"], deltas(before)["lm_head"])


def test_transposed_layers(make_adapter, load_adapter, tmp_path):
    source = make_adapter(architecture="gpt2", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    squeeze(str(source), tmp_path / "out", Amount(error=1e-7))
    found, expected = (logits(load_adapter(folder, "gpt2")) for folder in (tmp_path / "out", source))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_update_of_zero_keeps_rank_one(make_adapter, load_adapter, tmp_path):
    source = make_adapter()
    tensors = load_file(source / "adapter_model.safetensors")
    zero = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors[zero] = torch.zeros_like(tensors[zero])
    save_file(tensors, source / "adapter_model.safetensors")
    report = squeeze(str(source), tmp_path / "out", Amount(rank=7, per_module=True))
    ranks = {module["name"]: module["rank"] for module in report["modules"]}
    assert ranks["model.layers.0.self_attn.q_proj"] == 1
    assert not deltas(load_adapter(tmp_path / "out"))["model.layers.0.self_attn.q_proj"].any()


def damage(folder, **config):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora.*merge it"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*changes the base"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"r": 9}, "rank 9.*do not belong together"),
        ({"lora_alpha": None}, "None as rank or alpha"),
        ({"rank_pattern": {"(": 3}}, "cannot be read"),
    ],
)
def test_adapters_that_are_refused(make_adapter, tmp_path, config, message):
    source = make_adapter()
    damage(source, **config)
    with pytest.raises(InputError, match=message):
        squeeze(str(source), tmp_path / "out", Amount(rank=2))
    assert not (tmp_path / "out").exists()


def test_files_that_are_refused(make_adapter, llama, tmp_path):
    source = make_adapter()
    broken = {name: shutil.copytree(source, tmp_path / name) for name in ("none", "pickled", "half", "nan")}
    (broken["none"] / "adapter_config.json").unlink()
    (broken["pickled"] / "adapter_model.safetensors").rename(broken["pickled"] / "adapter_model.bin")
    tensors = load_file(source / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({key: t for key, t in tensors.items() if key != name}, broken["half"] / "adapter_model.safetensors")
    save_file({**tensors, name: tensors[name] * torch.nan}, broken["nan"] / "adapter_model.safetensors")
    for folder, message in (
        (broken["none"], "has no adapter_config.json"),
        (broken["pickled"], "pickled weights are not read"),
        (broken["half"], "it is damaged"),
        (broken["nan"], "non-finite"),
        (llama, "has no adapter_config.json"),
        (tmp_path / "nowhere", "is no folder"),
    ):
        with pytest.raises(InputError, match=message):
            squeeze(str(folder), tmp_path / "out", Amount(rank=2))
    wrong = Inputs(str(llama), [CalibrationSpec(samples=1, seqlen=16)])
    other = make_adapter(1, architecture="opt", target_modules=["fc1"])
    with pytest.raises(InputError, match="matches no linear layer"):
        squeeze(str(other), tmp_path / "out", Amount(rank=2), inputs=wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (Amount(), "give one of"),
        (Amount(rank=2, error=0.1), "give one of.*--rank and --error"),
        (Amount(rank=0), "at least 1"),
        (Amount(rank=8, per_module=True), "mean rank of 8 already"),
        (Amount(rank=8), "has rank 8 already"),
        (Amount(ratio=0.9), "rank 1 everywhere removes 0.8750"),
        (Amount(ratio=1.5), "outside"),
        (Amount(error=1.5), "outside"),
    ],
)
def test_amounts_that_are_refused(make_adapter, tmp_path, amount, message):
    with pytest.raises(InputError, match=message):
        squeeze(str(make_adapter()), tmp_path / "out", amount)
    assert not (tmp_path / "out").exists()


def test_command_line(make_adapter, tmp_path):
    source, out = make_adapter(), tmp_path / "out"
    result = run_cli("squeeze", source, "--ratio", 0.5, "-o", out, "--dry-run", "--json", tmp_path / "plan.json")
    assert result.returncode == 0, result.stderr
    assert "would remove 50." in result.stdout
    assert not out.exists()
    report = squeeze(str(source), out, Amount(ratio=0.5))
    assert report == json.loads((out / "report.json").read_text()) == json.loads((tmp_path / "plan.json").read_text())
    result = run_cli("squeeze", source, "--rank", 3, "-o", out)
    assert (result.returncode, "not empty" in result.stderr) == (2, True)
    assert json.loads((out / "report.json").read_text()) == report


def test_outputs(make_adapter, tmp_path, monkeypatch):
    source = make_adapter()
    monkeypatch.chdir(tmp_path)
    squeeze(str(source), None, Amount(error=0.2))
    folder = tmp_path / "adapter-0-squeezed-error-0.2"
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "report.json",
    }
    with pytest.raises(InputError, match="which is read"):
        squeeze(str(source), source, Amount(rank=2), overwrite=True)
    squeeze(str(source), folder, Amount(rank=2), overwrite=True)
    assert json.loads((folder / "report.json").read_text())["asked"]["rank"] == 2


def test_patterns_tell_layer_1_from_layer_11():
    from peft.utils.other import get_pattern_key

    from lrcompress.foreign.new_adapter import lora_settings

    names = ["h.1.a", "h.11.a", "x.h.1.a", "h.1_a", "hh1.a"]
    config = lora_settings({name: rank + 1 for rank, name in enumerate(names)})
    for pattern in (config["rank_pattern"], config["alpha_pattern"]):
        chosen = [pattern.get(get_pattern_key(pattern, name), config["r"]) for name in names]
        assert chosen == [1, 2, 3, 4, 5]
    assert config["rank_pattern"]["h.11.a"] == 2  # unmistakable: as PEFT itself writes it
    assert config["lora_alpha"] == config["r"] == 5


def test_a_base_whose_tokenizer_makes_tokens_that_it_does_not_know_is_bad_input(make_adapter, llama, tmp_path):
    from transformers import AutoTokenizer

    base = shutil.copytree(llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["the", "ing", "and", "not", "for", "all"])
    tokenizer.save_pretrained(base)
    inputs = Inputs(str(base), [CalibrationSpec(samples=3, seqlen=48)])
    with pytest.raises(InputError, match=r"base makes token 32\d, the model knows 320"):
        squeeze(str(make_adapter()), tmp_path / "out", Amount(rank=3), inputs=inputs)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_beside_an_adapter_comes_along(make_adapter, llama, tmp_path):
    from transformers import AutoTokenizer

    source, templates = make_adapter(), {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source)
    squeeze(str(source), tmp_path / "out", Amount(rank=3))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
