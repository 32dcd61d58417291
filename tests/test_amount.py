"""How much: a size of the whole checkpoint, a ratio of multiply-adds or ranks, a loss that is not exceeded."""

import errno
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lrcompress  # noqa: F401
from lrcompress.budget import kept_bytes, parse_size, removed
from lrcompress.cli.show import in_one_line
from lrcompress.cli.show_plan import predicted_in_words
from lrcompress.errors import InputError, Interrupted
from lrcompress.evaluation.gates import parse_expectation
from lrcompress.formats import FORMATS, build, spec_multiplies
from lrcompress.methods.lord import Lord
from lrcompress.overview import overview
from lrcompress.pipeline import compress, make_plan
from lrcompress.protocols import Spec
from lrcompress.recipe import Recipe, dump_recipe, load_recipe, make_recipe
from lrcompress.report.ci import markdown_summary
from lrcompress.report.progress import Reporter
from lrcompress.stages.naming import output_folder
from lrcompress.stages.opening import open_request
from lrcompress.stages.request import check_request
from tests.commands import run_cli
from tests.conftest import ARCHITECTURES, compress_tiny
from tests.products import multiply_adds
from tests.test_pipeline import header_bytes


def recipe(model, **changes):
    data = {"model": str(model), "method": "lord",
            "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64}, **changes}  # fmt: skip
    return make_recipe(data)


def all_bytes(folder):
    """Bytes of all tensors, from the raw safetensors headers."""
    return sum(
        path.stat().st_size - 8 - struct.unpack("<Q", path.read_bytes()[:8])[0] for path in folder.glob("*.safetensors")
    )


def file_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lord", "welore"])
def test_a_size_is_that_of_the_files(make_model, tmp_path, architecture, method):
    model = make_model(architecture)
    size = int(0.8 * all_bytes(model))
    result = compress_tiny(model, tmp_path / "out", method=method, ratio=None, size=size)
    assert 0.96 * size < file_bytes(result.folder) <= size
    assert result.report["bytes"]["checkpoint"] == all_bytes(result.folder)
    assert result.report["ratio"]["asked"] is None
    assert f"at most {size}" in (result.folder / "README.md").read_text()


def test_a_size_in_another_dtype_and_with_a_base(llama, tmp_path):
    half = all_bytes(llama) // 2
    size = int(0.8 * half)
    method = {"name": "eora", "propagation": "one_pass"}
    for name, changes in {"dtype": {}, "eora": {"method": method, "base": "rtn:4:64"}}.items():
        result = compress_tiny(llama, tmp_path / name, ratio=None, size=f"{size / 1e3}KB", dtype="bfloat16", **changes)
        assert 0.93 * size < file_bytes(result.folder) <= size


def test_the_smallest_size_is_named_and_possible(llama, tmp_path):
    with pytest.raises(InputError, match="ask for at least") as caught:
        compress_tiny(llama, tmp_path / "out", ratio=None, size="1KB")
    least = int(str(caught.value).partition("at least ")[2].split()[0])
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(InputError, match="ask for at least"):
        make_plan(recipe(llama, size=least - 1))
    assert 0.94 * least < file_bytes(compress_tiny(llama, tmp_path / "out", ratio=None, size=least).folder) <= least


def test_a_size_that_the_dense_checkpoint_has_already(llama, tmp_path):
    with pytest.raises(InputError, match="is that small already"):
        compress_tiny(llama, tmp_path / "out", ratio=None, size=all_bytes(llama))


@pytest.mark.parametrize(
    "spec",
    [
        Spec("low_rank", (12, 20), parameters={"rank": 5}),
        Spec("pivoted", (12, 20), parameters={"rank": 5}),
        Spec("quantized", (12, 20), parameters={"bits": 4, "group": 8}),
        Spec("semi_sparse", (12, 20), parameters={"pattern": "2:4"}),
        Spec("sparse_dictionary", (12, 20), parameters={"rank": 3, "atoms": 7}),
        Spec("sum", (12, 20), parameters={"base": {"format": "quantized", "bits": 4, "group": 8},
                                          "correction": {"format": "low_rank", "rank": 2, "bits": 16}}),
    ],
    ids=lambda spec: spec.format,
)  # fmt: skip
def test_multiply_adds_are_those_that_run(spec):
    module = build(spec, torch.float32)
    filled = {k: torch.ones_like(t) if t.is_floating_point() else torch.zeros_like(t)
              for k, t in module.state_dict().items()}  # fmt: skip
    if spec.format == "pivoted":
        filled["order"] = torch.arange(12, dtype=filled["order"].dtype)
    if spec.format == "sparse_dictionary":  # a mask or indices, in any case three different atoms in each row
        encoded = FORMATS.get(spec.format).encode(
            spec, torch.ones(7, 20), torch.ones(12, 7), torch.arange(7).expand(12, 7) < 3, None
        )
        filled |= encoded
    module.load_state_dict(filled)
    with torch.no_grad():
        assert multiply_adds(lambda: module(torch.ones(1, 20))) == spec_multiplies(spec)


def test_a_sparse_product_is_counted_as_such():
    spec = Spec("sparse_dictionary", (12, 20), parameters={"rank": 2, "atoms": 8})
    assert spec_multiplies(spec) == 8 * 20 + 12 * 2


@pytest.mark.parametrize("allocator", ["uniform", "welore", "marginal_error"])
def test_a_ratio_of_ranks(llama, tmp_path, allocator):
    result = compress_tiny(llama, tmp_path / "out", ratio=0.3, ratio_of="rank", format="pivoted", allocator=allocator)
    targets = result.report["targets"]
    removed = 1 - sum(t["rank"] for t in targets) / sum(min(t["shape"]) for t in targets)
    ratio = result.report["ratio"]
    assert 0.3 <= removed <= 0.31
    assert (ratio["asked"], ratio["of"], ratio["counted"]) == (0.3, "rank", pytest.approx(removed))
    stored = (
        1 - sum(header_bytes(result.folder, t["name"] + ".") for t in targets) / result.report["bytes"]["targets_dense"]
    )
    assert ratio["stored"] == pytest.approx(stored)
    assert abs(stored - removed) > 0.02
    assert "ranks" in (result.folder / "README.md").read_text()


@pytest.mark.parametrize("format", ["low_rank", "pivoted", "auto"])
def test_a_ratio_of_multiply_adds(llama, tmp_path, format):
    result = compress_tiny(llama, tmp_path / "out", ratio=0.3, ratio_of="flops", format=format)
    left = total = 0
    for t in result.report["targets"]:
        (m, n), r = t["shape"], t["rank"]
        left += {"low_rank": r * (m + n), "pivoted": r * (m + n - r), "dense": m * n}[t["format"]]
        total += m * n
    assert 0.3 <= 1 - left / total <= 0.32
    assert result.report["ratio"]["counted"] == pytest.approx(1 - left / total)
    AutoModelForCausalLM.from_pretrained(result.folder)


def test_a_ratio_of_multiply_adds_of_dictionaries_that_are_shared(llama):
    method = {"name": "cospadi", "group": 2}
    plan = make_plan(recipe(llama, method=method, ratio=0.3, ratio_of="flops"))
    assert plan["ratio"]["counted"] >= 0.3
    assert plan["ratio"]["of"] == "flops"


def test_the_plan_of_another_measure_is_what_is_written(llama, tmp_path):
    for name, changes in {"size": {"size": int(0.8 * all_bytes(llama)), "ratio": None},
                          "flops": {"ratio_of": "flops", "ratio": 0.3}}.items():  # fmt: skip
        plan = make_plan(recipe(llama, allocator="marginal_error", **changes))
        result = compress_tiny(llama, tmp_path / name, allocator="marginal_error", **changes)
        assert [(t["rank"], t["bytes"]) for t in plan["targets"]] == [
            (t["rank"], t["bytes"]) for t in result.report["targets"]
        ]
        assert plan["bytes"]["checkpoint"] == result.report["bytes"]["checkpoint"]
        errors = [t["relative_error"] for t in result.report["targets"]]
        assert errors == pytest.approx([t["relative_error"] for t in plan["targets"]])


def test_what_cannot_be_counted_is_refused(llama):
    with pytest.raises(InputError, match="no ranks of the weights"):
        make_plan(recipe(llama, method="cospadi", ratio=0.3, ratio_of="rank"))
    with pytest.raises(InputError, match="no ranks of the weights"):
        make_plan(recipe(llama, method="eora", base="rtn:4:64", ratio=0.3, ratio_of="rank"))
    with pytest.raises(InputError, match="no choice here with fewer flops"):
        make_plan(recipe(llama, method="eora", base="rtn:4:64", ratio=0.3, ratio_of="flops"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "it is not said how small: give bpw"),
        ({"ratio": 0.2, "size": "1MB"}, "ratio 0.2 and size 1MB were both asked"),
        ({"size": "1MB", "max_loss": "2%"}, "size 1MB and max_loss 0.02 were both asked"),
        ({"size": "1MB", "ratio_of": "flops"}, "ratio_of flops says what a ratio counts"),
        ({"ratio": 0.2, "ratio_of": "parameters"}, "'bytes', 'flops' or 'rank'"),
        ({"size": "lots"}, "write it like 200MB"),
        ({"size": "1.2.3MB"}, "write it like 200MB"),
        ({"size": "0MB"}, "write it like 200MB"),
        ({"size": True}, "a number or a text"),
        ({"max_loss": "2"}, "write it like 2%"),
        ({"max_loss": 0}, "write it like 2%"),
        ({"max_loss": "-1%"}, "write it like 2%"),
    ],
)
def test_bad_amounts_are_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        make_recipe({"model": "demo", "method": "lord", **changes})
    assert "\n" not in str(caught.value)


def test_recipes_of_amounts_are_read_back(tmp_path):
    for changes in ({"size": "1.5GB"}, {"max_loss": "2%"}, {"ratio": 0.2, "ratio_of": "rank"}):
        made = make_recipe({"model": "demo", "method": "lord", **changes})
        (tmp_path / "r.yaml").write_text(dump_recipe(made))
        assert load_recipe(str(tmp_path / "r.yaml"), []) == made
    assert make_recipe({"model": "demo", "method": "lord", "max_loss": "2%"}).max_loss == pytest.approx(0.02)
    keys = Recipe.model_json_schema()["properties"]
    assert {"size", "max_loss", "ratio_of"} <= keys.keys()


def test_output_folders_say_how_much():
    named = {"0.2-flops": {"ratio": 0.2, "ratio_of": "flops"}, "0.2": {"ratio": 0.2}, "200MB": {"size": "200 MB"},
             "loss-2%": {"max_loss": 0.02}}  # fmt: skip
    for suffix, changes in named.items():
        folder = output_folder(make_recipe({"model": "demo", "method": "lord", **changes}))
        assert folder.name.endswith(f"lord-{suffix}")


def test_the_command_line_asks_for_a_size(llama, tmp_path):
    size = int(0.8 * all_bytes(llama))
    run = run_cli("compress", llama, "--method", "lord", "--size", f"{size / 1e6}MB", "--samples", 4, "--seqlen", 64,
                  "-o", tmp_path / "out", "--save-recipe", tmp_path / "r.yaml")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "asked for a checkpoint of at most" in run.stdout
    page = run_cli("report", tmp_path / "out", "--html", tmp_path / "page.html", "--no-generate")
    assert page.returncode == 0, page.stderr
    assert "asked for a checkpoint of at most" in (tmp_path / "page.html").read_text()
    summary = markdown_summary(json.loads((tmp_path / "out/report.json").read_text()))
    assert "\nAsked for a checkpoint of at most" in summary
    assert all_bytes(tmp_path / "out") <= size
    saved = load_recipe(str(tmp_path / "r.yaml"), [])
    assert saved.model_dump(mode="json") == json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]


def searched(model, output, **changes):
    return compress_tiny(model, output, ratio=None, **{"max_loss": "5%", **changes})


def held_out_perplexity(folder, tokenizer, text, seqlen=64):
    """Over the first eight windows of the last tenth of the text, in a plain loop."""
    ids = tokenizer(text).input_ids
    ids = ids[len(ids) - len(ids) // 10 :]
    windows = [torch.tensor(ids[i * seqlen : (i + 1) * seqlen]) for i in range(8)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in windows]
    return float(torch.stack(losses).mean().exp())


METHODS = [
    {"method": "lord"},
    {"method": {"name": "auto", "propagation": "sequential"}, "format": "pivoted", "max_loss": "20%"},
    {"method": "eora", "base": "rtn:4:64", "max_loss": "20%"},
    {"method": {"name": "cospadi", "group": 2}, "max_loss": "20%"},
]


@pytest.mark.parametrize("changes", METHODS, ids=lambda c: str(c["method"]))
def test_a_loss_that_is_not_exceeded(llama, tmp_path, tokenizer, text, changes):
    result = searched(llama, tmp_path / "out", **changes)
    found, limit = result.report["search"], 0.05 if changes["method"] == "lord" else 0.2
    dense = held_out_perplexity(llama, tokenizer, text)
    assert found["dense_perplexity"] == pytest.approx(dense, rel=1e-4)
    assert found["windows"] == 8
    judged = {"windows": 8, "perplexity": found["perplexity"], "before": found["dense_perplexity"]}
    assert judged.items() <= result.report["held_out"].items()  # one figure, whatever tells it
    assert f"× {1 + found['loss']:.2f} on 8 windows of held-out" in in_one_line(result.report, result.folder)
    loss = held_out_perplexity(result.folder, tokenizer, text) / dense - 1
    assert loss == pytest.approx(found["loss"], abs=1e-4)
    assert loss <= limit
    assert result.report["bytes"]["checkpoint"] == found["bytes"] == all_bytes(result.folder)
    tried = found["candidates"]
    assert len(tried) <= 8
    assert found["bytes"] == min(c["bytes"] for c in tried if c["loss"] <= limit)
    above = [c["ratio"] for c in tried if c["loss"] > limit] + [found["range"][1]]
    next_above = min(r for r in above if r > found["ratio"])
    near = (1 - found["ratio"]) / (1 - next_above) <= 1.021
    assert found["loss"] >= 0.9 * limit or near or len(tried) == 8
    assert "above the dense model's" in (result.folder / "README.md").read_text()
    assert not (result.folder / "scratch").exists()
    alone = compress_tiny(llama, tmp_path / "alone", **{**changes, "ratio": found["ratio"], "max_loss": None})
    assert (alone.folder / "model.safetensors").read_bytes() == (result.folder / "model.safetensors").read_bytes()


def test_a_search_goes_on_where_it_was_interrupted(llama, tmp_path, monkeypatch):
    import lrcompress.stages.search as module

    measured = []
    real = module.load_model

    def load(folder, **rest):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(folder)
        return real(folder, **rest)

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    whole = searched(llama, tmp_path / "whole")
    monkeypatch.setattr(os, "link", refuse)  # as a file system without links does
    monkeypatch.setattr(module, "load_model", load)
    asked = recipe(llama, max_loss="5%", output=str(tmp_path / "out"))
    with pytest.raises(Interrupted):
        compress(asked)
    measured.append("go on")
    again = compress(asked, resume=True)
    assert len(measured) == 1 + 1 + len(again.report["search"]["candidates"])  # the dense model, and "go on"
    assert again.report["search"] == whole.report["search"]
    assert (again.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert compress(asked, resume=True).report == json.loads((again.folder / "report.json").read_text())


def test_a_loss_that_no_ratio_keeps(llama, tmp_path, monkeypatch):
    worse = iter([10.0, *(20.0 - n for n in range(8))])
    monkeypatch.setattr("lrcompress.stages.search._perplexity", lambda *_: next(worse))
    with pytest.raises(InputError, match=r"of \d candidates, ratio 0.0\d+, has a perplexity of 1\d \(\+\d0.00%\)"):
        searched(llama, tmp_path / "out", max_loss="2%")
    assert not (tmp_path / "out.partial").exists()


def test_candidates_that_are_not_finite_are_too_bad(llama, tmp_path, monkeypatch):
    import lrcompress.stages.search as module

    real = module._perplexity

    def perplexity(opened, folder, blocks):
        if opened.request.searched is not None and opened.request.searched > 0.1:
            raise ArithmeticError("the model puts out non-finite logits")
        return real(opened, folder, blocks)

    monkeypatch.setattr(module, "_perplexity", perplexity)
    result = searched(llama, tmp_path / "out", max_loss="90%")
    assert result.report["search"]["ratio"] <= 0.1
    assert json.loads((result.folder / "report.json").read_text())["search"]["candidates"][0]["perplexity"] is None


def test_a_plan_measures_nothing(llama):
    with pytest.raises(InputError, match="plan does not write"):
        make_plan(recipe(llama, max_loss="2%"))
    run = run_cli("plan", llama, "--method", "lord", "--max-loss", "2%")
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("method", ["lord", "auto", {"name": "cospadi", "group": 2}])
@pytest.mark.parametrize("larger", [True, False])
def test_weights_of_another_dtype_count_as_they_are_stored(llama, tmp_path, method, larger):
    """Some weights of a bfloat16 checkpoint in float32, or of a float32 checkpoint in bfloat16."""
    usual, other = (torch.bfloat16, torch.float32) if larger else (torch.float32, torch.bfloat16)
    folder = tmp_path / "mixed"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    mixed = {n: t.to(other if "v_proj" in n or "down_proj" in n else usual) for n, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    targets = [name for name in mixed if "_proj" in name]
    dense = sum(mixed[name].nbytes for name in targets)
    for ratio in (0.1, 0.4):
        result = compress_tiny(folder, tmp_path / f"out-{ratio}", method=method, ratio=ratio)
        stored = sum(
            tensor.nbytes
            for path in result.folder.glob("*.safetensors")
            for name, tensor in load_file(path).items()
            if "_proj" in name
        )
        assert stored <= (1 - ratio) * dense
        assert result.report["bytes"]["targets_stored"] == stored
        assert result.report["bytes"]["targets_dense"] == dense
        assert result.report["ratio"]["stored"] == (dense - stored) / dense >= ratio


def test_a_ratio_that_is_met_exactly_is_met():
    assert removed(34560, 38400) >= 0.1
    assert kept_bytes([10], 0.9) == 1
    for dense in range(1, 300):
        for percent in range(1, 100):
            kept = kept_bytes([dense], percent / 100)
            assert removed(kept, dense) >= percent / 100
            assert 100 * (kept + 1) > (100 - percent) * dense


def test_a_search_with_next_to_nothing_to_choose_from_tries_that(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("lrcompress.stages.search.reachable", lambda opened: 0.004)
    found = compress_tiny(llama, tmp_path / "out", ratio=None, max_loss=0.9).report["search"]
    assert [candidate["ratio"] for candidate in found["candidates"]] == [0.002]


def test_a_candidate_that_cannot_be_written_is_beyond_any_loss(llama, tmp_path, monkeypatch):
    encode = Lord.encode

    def overflows(self, spec, artefact, bias):
        stored = encode(self, spec, artefact, bias)
        return {k: t * (1e30 if spec.rank < 8 else 1.0) if t.is_floating_point() else t for k, t in stored.items()}

    monkeypatch.setattr(Lord, "encode", overflows)
    changes = {"ratio": None, "max_loss": 0.99, "dtype": "float16"}
    found = compress_tiny(llama, tmp_path / "out", **changes).report["search"]
    assert any(candidate["bytes"] is None for candidate in found["candidates"])
    assert found["loss"] <= 0.99


@pytest.mark.parametrize("asked", [{"refine": 1.0}, {"ratio": None, "max_loss": 0.1}])
def test_text_without_a_held_out_window_is_refused_before_the_long_work(llama, tmp_path, monkeypatch, asked):
    text = tmp_path / "short.txt"
    text.write_text("a few words " * 30)

    def profile(*args):
        raise AssertionError("it began")

    monkeypatch.setattr("lrcompress.pipeline.profile_model", profile)
    calibration = {"source": str(text), "samples": 2, "seqlen": 64}
    with pytest.raises(InputError, match="held-out window"):
        compress_tiny(llama, tmp_path / "out", calibration=calibration, **asked)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "method", [{"name": "lord", "metric": "plain", "propagation": "sequential", "toward_dense": 0.5}, "sensitivity"]
)
def test_what_needs_text_is_refused_where_none_is_read(llama, method):
    changes = {"method": method}
    if method == "sensitivity":
        changes = {"method": {"name": "lord", "metric": "plain"}, "allocator": "sensitivity"}
    with pytest.raises(InputError, match="metric plain reads none"):
        make_plan(recipe(llama, ratio=0.2, **changes))


def test_a_forgotten_unit_is_asked_for():
    for parse, text in ((parse_size, "60"), (parse_size, "1.5"), (parse_expectation, "bytes <= 200")):
        with pytest.raises(InputError, match=r"bytes: did you mean [0-9.]+MB\?"):
            parse(text)
    assert parse_size("4096") == 4096


@pytest.mark.parametrize(("amount", "hopeless"), [({"bpw": 1.9}, True), ({"bpw": 2.5}, False)])
def test_a_hopeless_amount_is_warned_of_before_the_text_is_read(llama, tmp_path, monkeypatch, amount, hopeless):
    said = []
    monkeypatch.setattr("lrcompress.stages.amount.FEW_BITS", 2.0)  # a toy of float32 cannot have fewer than 1.5
    monkeypatch.setattr("lrcompress.stages.opening.calibrate_model", lambda *args: said.append("text"))
    monkeypatch.setattr(Reporter, "warn", lambda self, line: said.append(line))
    open_request(check_request(recipe(llama, ratio=None, method="auto", **amount)), Reporter(quiet=True))
    numbers = sum(p.numel() for n, p in AutoModelForCausalLM.from_pretrained(llama).named_parameters() if "_proj" in n)
    assert said[-1] == "text"
    assert (len(said) == 2) == hopeless
    if hopeless:
        assert f"1.90 bits for each of the {numbers / 1e6:.4g} million weights" in said[0]


def test_a_plan_says_what_will_be_lost(llama):
    """As the table of sizes has it; a plan of too few bits says that the model is lost."""
    calibration = {"source": "python-docs", "samples": 4, "seqlen": 64}
    asked = recipe(llama, ratio=None, bpw=3, method="auto", calibration=calibration)
    plan = make_plan(asked)
    by_size = {choice.bits: choice.loss for choice in overview(asked, predict="yes").choices}
    assert plan["predicted"] == {"unit": "nats", "loss": pytest.approx(by_size[3.0], rel=1e-6)}
    assert predicted_in_words(0.1).endswith("perplexity about × 1.11")
    assert "cannot keep the model" in predicted_in_words(3.0)


def test_a_ratio_may_be_percent(llama):
    for given in ("20%", "0.2", 0.2, " 20 %"):
        assert make_recipe({"model": str(llama), "method": "lord", "ratio": given}).ratio == 0.2
    for given in ("120%", "0", "-3%", "a fifth", "1e400", True, [0.2]):
        with pytest.raises(InputError, match="ratio"):
            make_recipe({"model": str(llama), "method": "lord", "ratio": given})
    dump = dump_recipe(make_recipe({"model": str(llama), "method": "lord", "ratio": "20%"}))
    assert "ratio: 0.2\n" in dump
