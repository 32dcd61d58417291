"""Healing real checkpoints of tiny models: what changes, what must not, and that it is never worse."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lrcompress.calibration.corpus import Source
from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.errors import InputError, Interrupted
from lrcompress.evaluation.tasks import parse_tasks, was_calibrated_on
from lrcompress.formats.table import Table
from lrcompress.heal import HealSpec, heal
from lrcompress.model.surgery import stored_layers
from lrcompress.pipeline import compress
from lrcompress.protocols import Spec
from lrcompress.recipe import make_recipe
from lrcompress.report.summary import load_report
from lrcompress.stages.workspace import REPLACED
from lrcompress.training.loop import PROGRESS, STATE, Healer, last_complete
from lrcompress.training.rows import IGNORED, gather
from lrcompress.training.settings import Settings
from tests.checkpoint.test_loading import load
from tests.commands import run_cli
from tests.conftest import compress_tiny

SEQLEN = 32
KINDS = {
    "low_rank": {"method": "lord", "format": "low_rank", "ratio": 0.4, "dtype": "bfloat16"},
    "pivoted": {"method": {"name": "lord", "metric": "input"}, "format": "pivoted", "ratio": 0.3},
    "dictionary": {"method": {"name": "cospadi", "rounds": 2}, "ratio": 0.3},
    "sum16": {"method": {"name": "eora", "factor_bits": 16}, "base": "rtn:3:16", "rank": 3, "ratio": None},
    "sum8": {"method": {"name": "eora", "factor_bits": 8}, "base": "magnitude:2:4", "rank": 3, "ratio": None},
    "quantized": {"method": "eora", "base": "rtn:3:16", "rank": 0, "ratio": None},
    "sum of codes": {"method": {"name": "eora", "factor_bits": 8}, "base": "rtn:3:16", "rank": 3, "ratio": None},
    "coded": {
        "method": {"name": "ecsq", "metric": "input"},
        "bpw": 3,
        "ratio": None,
        "target": ["*embed_tokens", "*_proj"],
    },
    "welore": {"method": "welore", "format": "low_rank", "ratio": 0.2, "dtype": "bfloat16"},
}


TRAINED = {"sum8": "norms", "quantized": "scales", "sum of codes": "scales", "coded": "scales"}


@pytest.fixture(scope="module")
def healed(corpus):
    def run(folder, output, data=None, resume=False, dense=None, **settings):
        settings = {"steps": 6, "lr": 3e-3, "device": "cpu", **settings}
        spec = HealSpec(str(folder), (data or str(corpus),), 64, SEQLEN, dense, str(output), Settings(**settings))
        return heal(spec, resume=resume)

    return run


@pytest.fixture(scope="module")
def held_out(corpus, tokenizer):
    return gather([Source(str(corpus))], 4, SEQLEN, tokenizer, 0, corpus)[1]


@pytest.fixture
def checkpoint(compressed, corpus):
    return lambda kind: compressed(calibration={"source": str(corpus), "samples": 4, "seqlen": 64}, **KINDS[kind])


def tensors(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after):
    old, new = tensors(before), tensors(after)
    return {name for name in old if not torch.equal(old[name], new[name])}


def independent_loss(folder, rows):
    """Mean next-token loss on the held-out rows, by transformers' own loss."""
    with torch.no_grad():
        return float(load(folder, dtype=torch.float32)(input_ids=rows.ids, labels=rows.ids).loss)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_result_is_the_same_checkpoint_with_better_numbers(kind, checkpoint, tmp_path, healed, held_out):
    source, train = checkpoint(kind), TRAINED.get(kind, "factors")
    result = healed(source, tmp_path / "out", train=train)
    out, found = tmp_path / "out", result.report["healed"]
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    raw, new = ((folder / "model.safetensors").read_bytes() for folder in (source, out))
    size = 8 + int.from_bytes(raw[:8], "little")
    assert len(raw) == len(new)
    assert raw[:size] == new[:size]
    modules = json.loads((source / "config.json").read_text())["quantization_config"]["modules"]
    old = tensors(source)
    for name in changed(source, out):
        inside = any(name.startswith(module + ".") for module in modules)
        if train == "scales":
            assert name.endswith((".scales", ".scale")) if inside else "norm" in name
            continue
        assert old[name].is_floating_point()
        assert not name.endswith("scale")
        assert inside is (train == "factors")
    assert changed(source, out)
    # The held-out losses are those of the files, and the new one is lower.
    assert found["held_out"]["before"] == pytest.approx(independent_loss(source, held_out), rel=1e-5)
    assert found["held_out"]["after"] == pytest.approx(independent_loss(out, held_out), rel=1e-5)
    assert found["held_out"]["after"] < found["held_out"]["before"]
    assert found["steps"] == 6
    assert found["tokens"] == 6 * 4 * (SEQLEN - 1)
    assert not (tmp_path / "out.partial").exists()
    assert "held-out loss from" in (out / "README.md").read_text()


def test_scales_of_every_coded_weight_move_by_fractions(checkpoint, tmp_path, healed):
    source = checkpoint("coded")
    found = healed(source, tmp_path / "out", train="scales", lr=1e-2).report["healed"]
    modules = json.loads((source / "config.json").read_text())["quantization_config"]["modules"]
    moved = {name for name in changed(source, tmp_path / "out") if name.endswith(".scales")}
    assert len(moved) == len(modules)
    before, after = (stored_layers(load(folder, dtype=torch.float32)) for folder in (source, tmp_path / "out"))
    trained = 0
    for name, layer in before.items():
        old, new = (layer.codes if isinstance(layer, Table) else layer for layer in (layer, after[name]))
        assert torch.equal(old.integers(), new.integers())
        old, new = old.stored_scales(), new.stored_scales()
        for a, b in ((old.rows, new.rows), (old.columns, new.columns)):
            assert float((b / a - 1).abs().max()) < 6 * 1e-2 + 0.02  # six steps, and the grids of both
            trained += len(a)
    assert found["trainable"] - trained == sum(
        p.numel() for n, p in load(source).named_parameters() if n.endswith("norm.weight")
    )


@pytest.mark.parametrize("kind", ["quantized", "sum16", "sum of codes"])
def test_scales_of_groups_and_corrections_move_by_fractions(kind, checkpoint, tmp_path, healed):
    """And are what is trained where nothing is said, against the dense model's logits: codes stay as they are."""
    source = checkpoint(kind)
    found = healed(source, tmp_path / "out", train="auto", distill="auto", lr=1e-2).report["healed"]
    assert (found["train"], found["distill"]) == ("scales", "logits")
    old, new = tensors(source), tensors(tmp_path / "out")
    leaves = {
        "quantized": (".scale",), "sum16": (".base.scale", ".A.weight", ".B.weight"), "sum of codes": (".scale",),
    }  # fmt: skip
    expected = {name for name in old if name.endswith(leaves[kind])}
    moved = {name for name in changed(source, tmp_path / "out") if "norm" not in name}
    assert moved
    assert moved <= expected
    for name in moved:
        there = old[name] != 0
        assert float((new[name][there] / old[name][there] - 1).abs().max()) < 6 * 1e-2 + 0.02  # six steps
    norms = sum(tensor.numel() for name, tensor in old.items() if "norm" in name)
    assert found["trainable"] - norms == sum(old[name].numel() for name in expected)


def test_where_nothing_is_coded_there_are_no_scales(checkpoint, tmp_path, healed):
    with pytest.raises(InputError, match="none of its weights has integer codes with scales; use --train factors"):
        healed(checkpoint("low_rank"), tmp_path / "out", train="scales")


def test_training_that_makes_it_worse_or_breaks_it_leaves_the_weights(checkpoint, tmp_path, healed):
    for name, kind, train, rate in (
        ("worse", "low_rank", "all", 30.0), ("broken", "low_rank", "all", 1e30), ("below zero", "coded", "scales", 1e30),
    ):  # fmt: skip
        source = checkpoint(kind)
        result = healed(source, tmp_path / name, lr=rate, train=train)
        assert result.report["healed"]["kept"] is False
        assert changed(source, tmp_path / name) == set()
        assert result.report["healed"]["held_out"]["after"] == result.report["healed"]["held_out"]["before"]
        assert any("did not lower" in warning for warning in result.report["warnings"])
        assert "unchanged" in (tmp_path / name / "README.md").read_text()


def test_a_learning_rate_that_is_too_high_is_found_and_lowered(checkpoint, tmp_path, healed):
    """Training goes back to the best state, with a quarter of the rate each time, instead of ending with nothing."""
    source = checkpoint("low_rank")
    found = healed(source, tmp_path / "out", lr=1.0, train="all", steps=16).report["healed"]
    losses = [entry["held_out"] for entry in found["history"]]
    assert losses[0] > found["held_out"]["before"]
    assert found["kept"]
    assert found["lr_left"] <= 0.25
    assert found["held_out"]["after"] < found["held_out"]["before"]


def test_a_model_that_changes_outputs_in_place_is_healed(make_model, tmp_path, corpus, healed):
    """OLMo clips those of its projections, which the gradient of row scales reads."""
    model = shutil.copytree(make_model("olmo"), tmp_path / "olmo")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "clip_qkv": 0.5}))
    recipe = {**KINDS["coded"], "target": ["*_proj"]}
    source = compress_tiny(
        model, tmp_path / "small", calibration={"source": str(corpus), "samples": 4, "seqlen": 64}, **recipe
    )
    found = healed(source.folder, tmp_path / "out", train="scales", lr=1e-2).report["healed"]
    assert found["steps"] == 6
    assert found["kept"]


def test_a_checkpoint_that_was_not_written_to_its_end_is_none(tmp_path):
    for step, files in ((2, (STATE, PROGRESS, "trainer_state.json")), (4, (STATE, PROGRESS)), (6, ())):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).touch()
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert last_complete(tmp_path / "checkpoint-2") is None


def cut_short(monkeypatch, healed, step, *arguments, **settings):
    """Heal until Ctrl-C comes at that step."""
    advance = Healer.advance

    def interrupt(self):
        advance(self)
        if self.progress.steps == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Healer, "advance", interrupt)
        with pytest.raises(Interrupted):
            healed(*arguments, **settings)


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 3e-3), ("adamw", 1.0), ("lora-pro", 3e-3)])
def test_an_interrupted_run_resumed_ends_with_the_same_numbers(
    checkpoint, tmp_path, monkeypatch, optimizer, lr, healed
):
    """Also where the rate was too high before."""
    source, settings = checkpoint("pivoted"), {"steps": 8, "optimizer": optimizer, "lr": lr, "accumulate": 2}
    healed(source, tmp_path / "whole", **settings)
    cut_short(monkeypatch, healed, 5, source, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut").exists()
    result = healed(source, tmp_path / "cut", resume=True, **settings)
    assert changed(tmp_path / "whole", tmp_path / "cut") == set()
    assert result.report["healed"]["steps"] == 8
    assert (result.report["healed"]["lr_left"] < 1) is (lr == 1.0)
    assert [entry["step"] for entry in result.report["healed"]["history"]] == list(range(1, 9))
    assert healed(source, tmp_path / "cut", resume=True, **settings).report == result.report  # done: nothing to do


def test_resuming_with_another_text_or_as_another_command_is_refused(checkpoint, tmp_path, monkeypatch, corpus):
    source, text = checkpoint("low_rank"), tmp_path / "text.txt"
    text.write_text(corpus.read_text())

    def run(output, **options):
        settings = Settings(steps=2, batch=4, device="cpu")
        return heal(HealSpec(str(source), [str(text)], 8, SEQLEN, output=str(output), settings=settings), **options)

    cut_short(monkeypatch, run, 1, tmp_path / "cut")
    again = make_recipe({**load_report(source)["recipe"], "output": str(tmp_path / "cut")})
    with pytest.raises(InputError, match="cannot resume"):
        compress(again, resume=True)
    run(tmp_path / "done")
    text.write_text("another " + corpus.read_text())
    with pytest.raises(InputError, match="text changed since"):
        run(tmp_path / "cut", resume=True)
    with pytest.raises(InputError, match="holds a finished run, and text changed since"):
        run(tmp_path / "done", resume=True)


@pytest.mark.parametrize("same", [True, False])
def test_killed_just_before_its_result_was_moved_into_place(checkpoint, tmp_path, monkeypatch, healed, same):
    """Resumed, it is finished already; another run gives the folder back that was to be replaced."""
    source, output, partial = checkpoint("low_rank"), tmp_path / "out", tmp_path / "out.partial"
    output.mkdir()
    rename = Path.rename

    def ended(self, target):
        if self == partial:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", ended)
        with pytest.raises(Interrupted):
            healed(source, output)
    (partial / REPLACED / "mine").write_text("precious")
    before = (partial / "report.json").read_bytes()
    if same:
        healed(source, output, resume=True)
        assert (output / "report.json").read_bytes() == before
        assert not (output / "mine").exists()
    else:
        with pytest.raises(InputError, match="not empty"):
            healed(source, output, resume=True, lr=1e-4)
        assert (output / "mine").read_text() == "precious"


def test_resuming_with_other_settings_is_refused(checkpoint, tmp_path, monkeypatch, healed):
    source = checkpoint("low_rank")
    cut_short(monkeypatch, healed, 1, source, tmp_path / "cut")
    with pytest.raises(InputError, match="cannot resume .* asked changed"):
        healed(source, tmp_path / "cut", resume=True, lr=1e-4)


@pytest.mark.parametrize(
    ("kind", "train", "distill"),
    [("welore", "lrc", "none"), ("low_rank", "lrc", "none"), ("dictionary", "factors", "none"),
     ("sum8", "factors", "none"), ("sum of codes", "scales", "logits"), ("coded", "scales", "logits")],
)  # fmt: skip
def test_what_is_trained_unless_it_is_said(kind, train, distill, checkpoint):
    settled = Settings().settled(read_manifest(checkpoint(kind)).modules)
    assert (settled.train, settled.distill) == (train, distill)


def test_few_weights_of_low_rank_are_not_trained_alone():
    """Nor those whose right factor is another's."""
    high, low = (Spec("low_rank", (64, 64), parameters={"rank": rank}) for rank in (40, 4))
    follower = Spec("low_rank", (64, 64), parameters={"rank": 30, "shared": "low"})
    for others, train in (([], "lrc"), ([high], "factors"), ([follower], "lrc"), ([follower] * 20, "factors")):
        specs = {"low": low, **{str(place): spec for place, spec in enumerate(others)}}
        assert Settings().settled(specs).train == train


def test_lrc_trains_weights_that_lost_half_of_their_rank_and_no_others(checkpoint, tmp_path, healed):
    source = checkpoint("welore")
    healed(source, tmp_path / "out", train="lrc")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    low = {name for name, spec in config["modules"].items() if 2 * spec["rank"] <= min(spec["shape"])}
    assert low
    assert low != set(config["modules"]) or config["frozen"]
    assert {name.rsplit(".", 2)[0] for name in changed(source, tmp_path / "out")} == low


def product(stored, module):
    if f"{module}.A.weight" in stored:
        return stored[f"{module}.B.weight"].double() @ stored[f"{module}.A.weight"].double()
    pivot, rest = (stored[f"{module}.{part}.weight"].double() for part in ("pivot", "rest"))
    return torch.cat([pivot, rest @ pivot])


@pytest.mark.parametrize("kind", ["sum16", "pivoted"])
def test_singular_values_move_alone(kind, checkpoint, tmp_path, healed):
    source = checkpoint(kind)
    found = healed(source, tmp_path / "out", train="singular-values", lr=3e-2).report["healed"]
    before, after = tensors(source), tensors(tmp_path / "out")
    modules = json.loads((source / "config.json").read_text())["quantization_config"]["modules"]
    moved = 0.0
    for name, spec in modules.items():
        rank = spec.get("correction", spec)["rank"]
        u, s, vt = torch.linalg.svd(product(before, name), full_matrices=False)
        core = u.T @ product(after, name) @ vt.T
        torch.testing.assert_close(core - core.diag().diag(), torch.zeros_like(core), rtol=0, atol=1e-4 * float(s[0]))
        moved += float((core.diag() - s)[:rank].abs().sum())
    assert moved > 1e-3
    assert found["trainable"] == sum(spec.get("correction", spec)["rank"] for spec in modules.values())


def test_singular_values_of_a_correction_in_codes_are_its_scales(checkpoint, tmp_path, healed):
    healed(checkpoint("sum8"), tmp_path / "out", train="singular-values", lr=3e-2)
    names = changed(checkpoint("sum8"), tmp_path / "out")
    assert names
    assert all(name.endswith(".scale") for name in names)


def test_principal_trains_the_largest_entries_after_rank_reduction(checkpoint, tmp_path, healed):
    source = checkpoint("welore")
    found = healed(source, tmp_path / "out", train="principal").report["healed"]
    before, after = tensors(source), tensors(tmp_path / "out")
    frozen = json.loads((source / "config.json").read_text())["quantization_config"]["frozen"]
    assert {name.removesuffix(".weight") for name in changed(source, tmp_path / "out")} <= set(frozen)
    total = 0
    for name in frozen:
        weight = before[f"{name}.weight"].double()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        rank, count = round(min(weight.shape) / 8), round(0.05 * weight.numel())
        largest = ((u[:, :rank] * s[:rank]) @ vt[:rank]).abs().flatten().topk(count).indices
        moved = (before[f"{name}.weight"] != after[f"{name}.weight"]).flatten().nonzero().flatten()
        assert set(moved.tolist()) <= set(largest.tolist())
        total += count
    assert found["trainable"] == total
    tensors_of_adam = 2 * 4 * total
    assert tensors_of_adam <= found["optimizer_bytes"] <= tensors_of_adam + 4 * len(frozen)


def test_norms_and_all(checkpoint, tmp_path, healed):
    source = checkpoint("pivoted")
    healed(source, tmp_path / "norms", train="norms")
    assert {name.split(".")[-2].removeprefix("input_") for name in changed(source, tmp_path / "norms")} == {
        "layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    healed(source, tmp_path / "all", train="all", lr=1e-3)
    names = changed(source, tmp_path / "all")
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= names
    assert any("pivot" in name for name in names)
    assert not any(name.endswith(".order") for name in names)


@pytest.mark.parametrize("optimizer", ["lora-pro", "scaled"])
@pytest.mark.parametrize("kind", ["low_rank", "pivoted"])
def test_optimisers_of_pairs_lower_the_loss(kind, optimizer, checkpoint, tmp_path, healed):
    found = healed(checkpoint(kind), tmp_path / "out", optimizer=optimizer, lr=1e-3).report["healed"]
    assert found["held_out"]["after"] < found["held_out"]["before"]


@pytest.mark.parametrize("distill", ["logits", "features"])
def test_distilling_comes_nearer_to_the_dense_model(distill, checkpoint, tmp_path, healed, monkeypatch):
    """Whether the held-out loss falls is another matter, which training would go back for: this dense model is random."""
    monkeypatch.setattr(Healer, "_slow_down", lambda self, *, back: None)
    found = healed(checkpoint("low_rank"), tmp_path / "out", distill=distill, steps=24, lr=3e-3).report["healed"]
    apart = [entry["train"] for entry in found["history"]]
    assert 0 < apart[-1] < 0.8 * apart[0]


def test_four_bits_while_training_change_nothing_that_is_stored(checkpoint, tmp_path, healed):
    source = checkpoint("welore")
    found = healed(source, tmp_path / "out", load_4bit=True).report["healed"]
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    assert found["four_bit_layers"] == len(config["frozen"]) > 0
    assert changed(source, tmp_path / "out")
    assert not any(
        name.startswith(tuple(f"{f}." for f in config["frozen"])) for name in changed(source, tmp_path / "out")
    )


@pytest.mark.parametrize("kind", ["coded", "quantized", "low_rank"])
def test_gradient_checkpointing_makes_the_same_step_from_less(kind, checkpoint, tmp_path, healed, monkeypatch):
    """What is kept for the way back is counted where blocks ask for it; the trained tensors are equal."""
    kept = []

    def step(self, *arguments, **named):
        seen = {}

        def keep(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = once(self, *arguments, **named)
        kept.append(sum(seen.values()))
        return loss

    once = Healer.compute_loss
    monkeypatch.setattr(Healer, "compute_loss", step)
    for name, asked in (("plain", False), ("again", True)):
        healed(checkpoint(kind), tmp_path / name, steps=2, gradient_checkpointing=asked)
    assert max(kept[2:]) < min(kept[:2])
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "again")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_bfloat16_and_minutes_and_tokens(checkpoint, tmp_path, healed):
    source = checkpoint("low_rank")
    found = healed(source, tmp_path / "time", steps=None, minutes=0.02, dtype="bfloat16").report["healed"]
    assert 0.02 <= found["minutes"] < 0.2
    assert found["kept"]
    found = healed(source, tmp_path / "tokens", steps=None, tokens=1000).report["healed"]
    assert 1000 <= found["tokens"] < 1000 + 4 * SEQLEN


@pytest.mark.parametrize("kind", ["coded", "quantized", "sum16", "pivoted"])
def test_every_kind_is_trained_in_bfloat16(kind, checkpoint, tmp_path, healed):
    found = healed(checkpoint(kind), tmp_path / "out", train="auto", distill="auto", steps=2, dtype="bfloat16")
    assert found.report["healed"]["steps"] == 2
    assert found.report["healed"]["history"]


def test_answers_alone_are_learnt(checkpoint, tmp_path, healed):
    records = [{"q": f"What is {n}? ", "a": f"It is {n}."} for n in range(30)]
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    found = healed(checkpoint("low_rank"), tmp_path / "out", data=f"{path}:q,a", steps=10).report["healed"]
    assert found["held_out"]["after"] < found["held_out"]["before"]
    assert found["rows"] == {"train": 27, "held_out": 3}


def test_rows_of_answers(tokenizer, tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(json.dumps({"p": "ab cd " * n, "a": f"xyz {n}"}) for n in range(1, 21)))
    train, held_out = gather([Source(str(path), "p,a")], 100, 24, tokenizer, 0, tmp_path)
    assert (len(train), len(held_out)) == (18, 2)
    for ids, targets in zip(train.ids.tolist(), train.targets.tolist(), strict=True):
        answer = [t for t in targets if t != IGNORED]
        text = tokenizer.decode(answer)
        assert text.startswith("xyz ")
        assert text.endswith("</s>")
        first = targets.index(answer[0])
        assert ids[first + 1 : first + 1 + len(answer)] == answer  # each position predicts the next token
        assert "ab cd" in tokenizer.decode(ids[: first + 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "factor"], "did you mean 'factors'"),
        (["--optimizer", "sgd"], "--optimizer 'sgd' is unknown"),
        (["--minutes", "1", "--steps", "5"], "give one of them"),
        (["--lr", "-1"], "--lr -1.0 must be above zero"),
        (["--data", "nowhere.txt"], "data nowhere.txt does not exist"),
        (["--train", "norms", "--optimizer", "scaled"], "moves pairs of factors"),
        (["--train", "principal"], "no weight of its blocks is dense"),
        (["--distill", "logits", "--dense", "/nowhere"], "model /nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, checkpoint, tmp_path, capsys):
    from typer.testing import CliRunner

    from lrcompress.cli.app import app

    command = ["heal", str(checkpoint("pivoted")), "-o", str(tmp_path / "out"), "--quiet", "--steps", "1"]
    if "--steps" in arguments:
        command = command[:-2]
    result = CliRunner().invoke(app, [*command, *arguments])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_checkpoint_is_refused(llama, tmp_path):
    done = run_cli("heal", llama, "-o", tmp_path / "out", "--steps", 1)
    assert done.returncode == 2
    assert "is no compressed checkpoint: compress it first" in done.stderr


@pytest.mark.slow
def test_two_processes_train_one_model(checkpoint, corpus, tmp_path):
    """As many rows a step at two processes as at one: the numbers agree up to the order of sums."""
    source = checkpoint("pivoted")
    common = [
        "--data",
        corpus,
        "--seqlen",
        SEQLEN,
        "--steps",
        4,
        "--lr",
        1e-3,
        "--device",
        "cpu",
        "--distill",
        "logits",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "lrcompress", "heal", source,
               "--batch-size", 2, "-o", tmp_path / "two", *common]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out perplexity") == 1  # the first process speaks
    assert run_cli("heal", source, "--batch-size", 4, "-o", tmp_path / "one", *common).returncode == 0
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    reports = [json.loads((tmp_path / name / "report.json").read_text())["healed"] for name in ("one", "two")]
    assert reports[1]["processes"] == 2
    assert math.isclose(*(r["held_out"]["after"] for r in reports), rel_tol=1e-4)


def test_the_report_names_all_text_that_was_trained_on(checkpoint, tmp_path, corpus, healed):
    source = checkpoint("low_rank")
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text(encoding="utf8")[-30000:], encoding="utf8")
    healed(source, tmp_path / "one", steps=1)
    for data in (other, corpus):
        report = healed(tmp_path / "one", tmp_path / f"two-{data.stem}", f"{data}*2", steps=1).report
        assert report["trained_on"] == [str(corpus), f"{data}*2"]
    tasks = parse_tasks([f"text:{other}", f"tokens:{corpus}@8", "tokens:c4@8"])
    report = {**load_report(tmp_path / "two-other"), "recipe": {"calibration": []}}
    assert [was_calibrated_on(task.source, report) for task in tasks] == [True, True, False]


@pytest.mark.parametrize("distill", ["none", "features"])
def test_a_token_that_the_checkpoint_or_its_teacher_does_not_know_is_bad_input(
    checkpoint, llama, corpus, tmp_path, healed, distill
):
    """The checkpoint's tokenizer has a token more; the teacher is refused for it before the checkpoint is loaded."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(checkpoint("low_rank"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(folder)
    message = "makes token 320, the model knows 320" if distill == "none" else "the dense model has another vocabulary"
    with pytest.raises(InputError, match=message):
        healed(folder, tmp_path / "out", distill=distill, dense=str(llama))
    assert not (tmp_path / "out").exists()
