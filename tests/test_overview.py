"""What every size of a model would take and give, before anything is compressed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrcompress.bases import parse_base
from lrcompress.calibration.corpus import parse_source
from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.checkpoint.cache import entries
from lrcompress.cli.show_plan import show_choices
from lrcompress.errors import InputError
from lrcompress.linalg.whitening import damped
from lrcompress.methods import make_method
from lrcompress.methods.ecsq import relative_error_of, weight_of
from lrcompress.overview import BITS, overview
from lrcompress.protocols import InputStatistics, Lookups, Site
from tests.commands import run_cli
from tests.conftest import compress_tiny
from tests.test_pipeline import recipe

WIDE = {"method": "auto", "ratio": None, "bpw": 4.0}


@pytest.fixture(scope="module")
def found(llama):
    return overview(recipe(llama, **WIDE), predict="yes")


def test_a_size_is_that_of_the_files_that_would_be_written(llama, tmp_path, found):
    assert [choice.bits for choice in found.choices] == [bits for bits in BITS if bits >= found.least]
    for choice in found.choices[3:4]:
        result = compress_tiny(llama, tmp_path / str(choice.bits), **{**WIDE, "bpw": choice.bits})
        tensors = load_file(result.folder / "model.safetensors")
        written = sum(t.numel() * t.itemsize for t in tensors.values())
        assert 0.99 * choice.bytes < written <= choice.bytes


def test_a_plain_rounding_is_as_large_as_its_tensors(llama, found):
    weights = load_file(llama / "model.safetensors")
    targets = {name for name, weight in weights.items() if name.startswith("model.layers") and weight.dim() == 2}
    other = sum(weight.numel() * 4 for name, weight in weights.items() if name not in targets)
    plain = {choice.plain.base: choice.plain for choice in found.choices}
    assert len(plain) > 1
    for base, rounding in plain.items():
        tensors = [t for name in targets for t in parse_base(base).compress(weights[name], None).tensors.values()]
        stored = sum(t.numel() * (4 if t.is_floating_point() else t.itemsize) for t in tensors)
        assert rounding.bytes == other + stored
        assert rounding.bits == pytest.approx(8 * stored / sum(weights[name].numel() for name in targets))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(rows, outputs, inputs, gradients=None):
    x = random(rows, inputs, seed=1)
    return InputStatistics(float(rows), x.sum(0), x.T @ x, gradients, rows=rows)


def test_the_error_of_another_weight_is_the_quadratic_form_of_both_grams():
    g = random(200, 24, seed=2)
    own = statistics(300, 24, 40, g.T @ g / 200)
    weight, other = random(24, 40).float(), random(24, 40, seed=3).float()
    site = Site("layer", (24, 40), 0, "layer", False)
    artefact = make_method("auto", {}).decompose(site, weight, own)
    torch.testing.assert_close(weight_of(artefact), weight)
    outputs, inputs = damped(own.gradients, 0.1), damped(own.gram(), 0.01)

    def size(matrix):
        return float(torch.trace(outputs @ matrix @ inputs @ matrix.T))

    wanted = size((other - weight).double()) / size(weight.double())
    assert relative_error_of(artefact, other) == pytest.approx(wanted, rel=1e-4)
    assert relative_error_of(artefact, weight) < 1e-9
    assert relative_error_of(artefact, torch.zeros_like(weight)) == pytest.approx(1, rel=1e-4)


def test_the_error_of_another_matrix_of_tokens_is_that_of_its_rows():
    weight = random(50, 12).float()
    counts = torch.arange(50, dtype=torch.float64)
    own = statistics(10, 50, 12)
    own.lookups = Lookups(counts, torch.eye(12, dtype=torch.float64))
    site = Site("table", (50, 12), 0, "table", False, lookup=True)
    artefact = make_method("auto", {"damping": 0.0}).decompose(site, weight, own)
    torch.testing.assert_close(weight_of(artefact), weight)
    wrong, shares = weight.clone(), (counts + 3) / counts.sum()
    wrong[7] = 0
    wanted = float(shares[7] * weight[7].double().square().sum() / (shares @ weight.double().square().sum(1)))
    assert relative_error_of(artefact, wrong) == pytest.approx(
        wanted, rel=0.02
    )  # rows of about one share have one factor


def test_a_predicted_loss_is_about_the_divergence_that_rounding_makes(llama, tokenizer):
    """To second order the loss, expected under the model's own predictions, rises by the divergence from them."""
    method = {"name": "auto", "labels": "sampled", "damping": 0.0, "gradient_damping": 0.0}
    rounded = overview(recipe(llama, **{**WIDE, "method": method}), predict="yes").choices[0].plain
    assert rounded.base == "rtn:8:64"
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = calibration_blocks([(parse_source("python-docs"), 4, 64)], tokenizer, 0, llama).ids
    with torch.no_grad():
        before = model(ids).logits[:, :-1].double().log_softmax(-1)
        for name, weight in model.named_parameters():
            if name.startswith("model.layers") and weight.dim() == 2:
                weight.copy_(parse_base(rounded.base).compress(weight, None).dense)
        after = model(ids).logits[:, :-1].double().log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 < rounded.loss / divergence < 2


def test_losses_rise_as_bits_fall_and_plain_rounding_loses_more(llama, found):
    losses = [choice.loss for choice in found.choices]
    assert found.unit == "nats"
    assert losses == sorted(losses)
    assert losses[0] > 0
    assert all(choice.plain.loss > choice.loss for choice in found.choices if choice.plain.bytes <= choice.bytes)
    plain = overview(recipe(llama, **{**WIDE, "method": {"name": "ecsq", "metric": "plain"}}), predict="kept")
    assert plain.unit == "relative"
    base = parse_base(plain.choices[0].plain.base)
    weights = load_file(llama / "model.safetensors")
    squares = [0.0, 0.0]
    for name, weight in weights.items():
        if name.startswith("model.layers") and weight.dim() == 2:
            error = base.compress(weight, None).dense - weight.double()
            squares = [squares[0] + float(error.square().sum()), squares[1] + float(weight.double().square().sum())]
    assert plain.choices[0].plain.loss == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)


def test_losses_come_from_statistics_that_are_kept(llama, tmp_path, monkeypatch, found):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    asked = recipe(llama, **WIDE)
    before = overview(asked, predict="kept")
    assert before.unit is None
    assert all(choice.loss is None and choice.plain.loss is None for choice in before.choices)
    assert not [entry for entry in entries() if entry.kind == "statistics"]
    compress_tiny(llama, tmp_path / "out", **WIDE)
    after = overview(asked, predict="kept")
    assert [choice.loss for choice in after.choices] == pytest.approx([choice.loss for choice in found.choices])
    assert [choice.bytes for choice in after.choices] == [choice.bytes for choice in before.choices]
    assert overview(asked).unit is None


def test_the_table_fits_80_columns_and_is_whole_in_json(llama, tmp_path, found, capsys):
    done = run_cli("plan", llama, "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["unit"] is None
    assert [choice["bytes"] for choice in kept["choices"]] == [choice.bytes for choice in found.choices]
    assert all(choice["memory"] > choice["bytes"] > 0 < choice["speed"] for choice in kept["choices"])
    assert f"predicted losses: lrcompress plan {llama} --calibration" in done.stdout
    assert f"lrcompress compress {llama} --bpw" in done.stdout
    show_choices(replace(found, model="org/some-model-name"), quiet=False)
    for text in (done.stdout, capsys.readouterr().out):
        table = [line for line in text.splitlines() if line[:1] in "┏┃┡│└"]
        assert len(table) == len(kept["choices"]) + 4
        assert max(map(len, table)) <= 80
    for choice in found.choices:
        row = next(line for line in table if line.startswith("│") and float(line.split("│")[1]) == choice.bits)
        assert choice.plain.base in row
        assert f"{choice.loss:.2g}" in row
    show_choices(found, quiet=True)
    assert not capsys.readouterr().out


def test_methods_without_such_a_table_and_commands_without_an_amount_say_what_to_give(llama, tmp_path):
    with pytest.raises(
        InputError, match=r"method lord has no table of sizes, auto and ecsq have: say how small: --bpw"
    ):
        overview(recipe(llama))
    done = run_cli("compress", llama, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for flag in ("--bpw 3", "--size 60MB", "--ratio 0.8", "--max-loss 2%", "--rank 16", "lrcompress plan"):
        assert flag in done.stderr
    with pytest.raises(InputError, match="recipe: it is not said how small: give bpw"):
        recipe(llama, ratio=None)
