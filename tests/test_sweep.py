"""Sweeps: the same checkpoints as single runs, resumable, a table and a picture of what was measured."""

import csv
import json
import os
import shutil
import xml.etree.ElementTree as ET

import pytest

import lrcompress.sweep
from lrcompress.cli.sweep import sweep_tables
from lrcompress.errors import InputError, Interrupted
from lrcompress.evaluation.compare import evaluate
from lrcompress.recipe import EvaluateSpec, Sweep, make_recipe, validated
from lrcompress.report.pareto import curves
from lrcompress.sweep import sweep
from tests.commands import run_cli
from tests.conftest import compress_tiny

TEXT = "tokens:python-docs@64"


def recipe(model, output, **changes):
    data = {"model": str(model), "methods": ["lord", {"name": "auto", "propagation": "sequential"}], "ratios": [0.4, 0.2],
            "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64}, "output": str(output),
            "evaluate": {"tasks": [TEXT], "limit": 3}, **changes}  # fmt: skip
    return validated(Sweep, data, "test")


@pytest.fixture
def swept(llama, once):
    folder = once("sweep", lambda folder: sweep(recipe(llama, folder, keep=True)))
    return folder, json.loads((folder / "results.json").read_text())


def test_points_are_the_checkpoints_of_single_runs(llama, swept, tmp_path):
    folder, result = swept
    assert [(p["method"], p["ratio"]) for p in result["points"]] == [
        ("lord", 0.2), ("lord", 0.4), ("auto-propagation=sequential", 0.2), ("auto-propagation=sequential", 0.4),
    ]  # fmt: skip
    for method, name in (
        ("lord", "lord"),
        ({"name": "auto", "propagation": "sequential"}, "auto-propagation=sequential"),
    ):
        alone = compress_tiny(llama, tmp_path / name, method=method, ratio=0.4)
        swept_file = folder / f"{name}-0.4-seed0" / "model.safetensors"
        assert swept_file.read_bytes() == (alone.folder / "model.safetensors").read_bytes()
    assert all(p["stored_ratio"] >= p["ratio"] for p in result["points"])
    assert all(p["bpw"] == pytest.approx(32 * (1 - p["stored_ratio"])) for p in result["points"])  # of float32


def test_the_table_says_what_the_points_say(swept):
    folder, result = swept
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["method"] for row in rows] == ["dense", *(p["method"] for p in result["points"])]
    key = f"{TEXT}:token_perplexity"
    measured = [p["results"][TEXT]["token_perplexity"] for p in [result["dense"], *result["points"]]]
    assert [float(row[key]) for row in rows] == pytest.approx(measured)
    picture = next(folder.glob("pareto-*.svg")).read_text()
    assert ET.fromstring(picture).tag.endswith("svg")
    lines = curves(result, TEXT, "token_perplexity")
    assert {method: len(points) for method, points in lines.items()} == {"lord": 2, "auto-propagation=sequential": 2}
    assert lines["lord"] == sorted(lines["lord"])


def test_an_interrupted_sweep_goes_on(llama, tmp_path, monkeypatch):
    measured = []
    real = lrcompress.sweep._evaluate

    def evaluate(recipe, model, against, reporter):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(model)
        return real(recipe, model, against, reporter)

    monkeypatch.setattr(lrcompress.sweep, "_evaluate", evaluate)
    asked = recipe(llama, tmp_path / "out", methods=["lord"])
    with pytest.raises(Interrupted):
        sweep(asked)
    measured.append("go on")
    result = sweep(asked)
    assert [name.rpartition("/")[2] for name in measured] == [llama.name, "lord-0.2-seed0", "go on", "lord-0.4-seed0"]
    assert len(result["points"]) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "points", "sweep.json", "dense.json", "results.json", "sweep.csv", "pareto-tokens-python-docs-64-token_perplexity.svg",
    }  # fmt: skip


def test_bad_sweeps_are_refused_before_anything_runs(llama, swept, tmp_path):
    folder, _ = swept
    with pytest.raises(InputError, match="another sweep \\(calibration differ"):
        sweep(recipe(llama, folder, calibration={"source": "python-docs", "samples": 5, "seqlen": 64}))
    with pytest.raises(InputError, match="lordd"):
        sweep(recipe(llama, tmp_path / "out", methods=["lordd"]))
    with pytest.raises(InputError, match="listed twice"):
        recipe(llama, tmp_path / "out", methods=["lord", "lord"])
    with pytest.raises(InputError, match="ratio"):
        sweep(recipe(llama, tmp_path / "out", ratios=[1.5]))
    with pytest.raises(InputError, match="lrcompress sweep"):
        make_recipe({"model": "demo", "methods": ["lord"], "ratios": [0.1]})
    assert not (tmp_path / "out").exists()


def small(llama, output, **changes):
    """One method, one ratio, little to measure."""
    return recipe(llama, output, **{"methods": ["lord"], "ratios": [0.2], **changes})


def test_changed_files_and_versions_are_noticed(llama, tmp_path, text, monkeypatch):
    model, calibration, asked, base = (tmp_path / name for name in ("model", "c.txt", "t.txt", "base"))
    shutil.copytree(llama, model)
    calibration.write_text(text[:20000], encoding="utf8")
    asked.write_text(text[20000:22000], encoding="utf8")
    compress_tiny(llama, base, ratio=0.1)
    changes = {"calibration": {"source": str(calibration), "samples": 4, "seqlen": 64},
               "evaluate": {"tasks": [f"tokens:{asked}@64"], "limit": 2}}  # fmt: skip
    eora = {"name": "eora", "base": str(base)}
    first = sweep(small(model, tmp_path / "out", **changes))
    grown = sweep(small(model, tmp_path / "out", ratios=[0.2, 0.3], **changes))
    assert grown["points"][0] == first["points"][0]
    for path in (model / "model.safetensors", calibration, asked):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(InputError, match=f"another sweep .*{model if path.parent == model else path}"):
            sweep(small(model, tmp_path / "out", ratios=[0.2, 0.4], **changes))
        path.write_bytes(before)
    os.utime(model / "model.safetensors", (1, 1))
    assert sweep(small(model, tmp_path / "out", **changes)) == first, "the same bytes are the same model"
    identity = (tmp_path / "out/sweep.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(lrcompress.sweep, "versions", lambda: {"torch": "0.1"})
        with pytest.raises(InputError, match="versions differ"):
            sweep(small(model, tmp_path / "out", **changes))
    assert (tmp_path / "out/sweep.json").read_bytes() == identity
    sweep(small(model, tmp_path / "out", methods=["lord", eora], ratios=[0.2], **changes))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config, indent=1))
    with pytest.raises(InputError, match=f"another sweep .*{base}"):
        sweep(small(model, tmp_path / "out", methods=[eora], ratios=[0.2], **changes))


def test_ratios_that_look_alike_are_points_of_their_own(llama, tmp_path):
    result = sweep(small(llama, tmp_path / "out", ratios=[0.2, 0.2000001], evaluate={"tasks": [TEXT], "limit": 1}))
    assert [row["ratio"] for row in result["points"]] == [0.2, 0.2000001]
    assert len(list((tmp_path / "out/points").iterdir())) == 2
    with pytest.raises(InputError, match="two points lord-0.2-seed0"):
        sweep(small(llama, tmp_path / "other", ratios=[0.2, 0.2]))
    assert not (tmp_path / "other").exists()


def test_a_point_out_of_reach_leaves_the_others(llama, tmp_path):
    methods = [{"name": "eora", "base": "rtn:3:16"}, "lord"]
    asked = small(llama, tmp_path / "out", methods=methods, ratios=[0.6, 0.999])
    result = sweep(asked)
    assert ["error" in row for row in result["points"]] == [False, True, False, True]
    assert "0.999" in result["points"][1]["error"]
    rows = list(csv.DictReader((tmp_path / "out/sweep.csv").open()))
    assert [bool(row[f"{TEXT}:token_perplexity"]) for row in rows] == [True, True, False, True, False]
    assert [len(points) for points in curves(result, TEXT, "token_perplexity").values()] == [1, 1]
    assert [list(column.cells)[-1] for column in sweep_tables(result)[0].columns][::2] == ["lord", "-"]
    assert sweep(asked) == result
    with pytest.raises(InputError, match="no point of the sweep has results: .*at most"):
        sweep(small(llama, tmp_path / "none", ratios=[0.999]))


def test_a_model_that_cannot_be_measured_leaves_the_others(llama, tmp_path, monkeypatch):
    real = lrcompress.sweep._evaluate

    def evaluate(recipe, model, against, reporter):
        if "lord-0.2" in model:
            raise InputError("non-finite logits")
        return real(recipe, model, against, reporter)

    monkeypatch.setattr(lrcompress.sweep, "_evaluate", evaluate)
    result = sweep(small(llama, tmp_path / "out", ratios=[0.2, 0.3], keep=True))
    assert [row.get("error") for row in result["points"]] == ["non-finite logits", None]
    assert not (tmp_path / "out/lord-0.2-seed0").exists()
    assert (tmp_path / "out/lord-0.3-seed0").exists()


def test_overwrite_removes_sweeps_only_and_no_inputs(llama, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="no sweep's"):
        sweep(small(llama, mine), overwrite=True)
    assert (mine / "thesis.txt").exists()
    out = tmp_path / "out"
    sweep(small(llama, out))
    shutil.copytree(llama, out / "model")
    (out / "text.txt").write_text("words " * 2000)
    calibration = {"source": str(out / "text.txt"), "samples": 2, "seqlen": 64}
    for model, changes in ((out / "model", {}), (llama, {"calibration": calibration}),
                           (llama, {"evaluate": {"tasks": [f"tokens:{out}/text.txt@64"]}})):  # fmt: skip
        with pytest.raises(InputError, match="which is read"):
            sweep(small(model, out, **changes), overwrite=True)
    with pytest.raises(InputError, match="nowhere"):
        sweep(small("./nowhere", out), overwrite=True)
    assert (out / "results.json").exists()
    (out / "stale").write_text("x")
    sweep(small(llama, out), overwrite=True)
    assert not (out / "stale").exists()
    with pytest.raises(InputError, match="is a file"):
        sweep(small(llama, mine / "thesis.txt"), overwrite=True)


def test_points_against_the_dense_model(llama, tmp_path):
    against = {"tasks": [TEXT], "limit": 6, "against": "dense"}
    result = sweep(small(llama, tmp_path / "out", ratios=[0.6], evaluate=against, keep=True))
    small_one = str(tmp_path / "out/lord-0.6-seed0")
    alone = evaluate(small_one, EvaluateSpec(tasks=[TEXT], limit=6, against=str(llama)))
    assert result["points"][0]["results"] == alone["results"]
    assert result["points"][0]["tests"] == alone["against"]["tests"]
    rows = list(csv.DictReader((tmp_path / "out/sweep.csv").open()))
    assert [bool(row[f"{TEXT}:kl"]) for row in rows] == [False, True]
    tables = {table.title: table for table in sweep_tables(result)}
    assert [title.split()[1].strip(",") for title in tables] == [
        "token_perplexity",
        "kl",
        "kl_median",
        "kl_p90",
        "kl_floor",
        "top1",
    ]
    cell = next(iter(next(iter(tables.values())).columns[1].cells))
    word = "significant" if alone["against"]["tests"][TEXT]["token_perplexity"]["significant"] else "not significant"
    assert cell.endswith(f", {word})")


def test_the_picture_has_the_dense_point(swept):
    """At its bytes and perplexity: to the right of all points."""
    folder, result = swept
    picture = ET.fromstring(next(folder.glob("pareto-*.svg")).read_text())
    named = {e.get("id"): e for e in picture.iter() if e.get("id")}
    dense = [float(use.get("x")) for use in named["dense"].iter() if use.tag.endswith("use")]
    assert len(dense) == 1
    assert result["dense"]["bytes"] > max(row["bytes"] for row in result["points"])


def test_the_shipped_sweep_from_the_command_line(llama, tmp_path):
    run = run_cli("sweep", "sweep", "-o", tmp_path / "out", "--set", f"model={llama}", "--set", "ratios=[0.3]",
                  "--set", "methods=[lord]", "--set", "calibration.samples=4", "--set", "calibration.seqlen=64",
                  "--set", "evaluate.tasks=[tokens:python-docs@64]", "--json", tmp_path / "out.json")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "30%" in run.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["points"]) == 1


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_is_a_file_is_refused(llama, tmp_path, output):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        sweep(recipe(llama, tmp_path / output))
