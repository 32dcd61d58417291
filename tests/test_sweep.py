"""Sweeps: the same checkpoints as single runs, resumable, a table and a picture of what was measured."""

import csv
import json
import xml.etree.ElementTree as ET

import pytest

import lrcompress.sweep
from lrcompress.errors import InputError, Interrupted
from lrcompress.recipe import Sweep, make_recipe, validated
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


@pytest.fixture(scope="module")
def swept(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep(recipe(llama, folder, keep=True))


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

    def evaluate(recipe, model, reporter):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(model)
        return real(recipe, model, reporter)

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
