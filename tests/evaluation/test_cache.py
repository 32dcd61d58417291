"""What a second run finds in the cache, and when it must not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrcompress.evaluation.compare as compare
from lrcompress.checkpoint.cache import content_digest, note, recall
from lrcompress.evaluation.compare import evaluate
from lrcompress.recipe import EvaluateSpec, make_recipe
from lrcompress.run import run_recipe
from tests.commands import run_cli


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded to be run, in order."""
    seen, real = [], compare.load_model

    def load_model(label, **options):
        seen.append(label)
        return real(label, **options)

    monkeypatch.setattr(compare, "load_model", load_model)
    return seen


@pytest.fixture
def parity(tmp_path):
    rows = [{"q": f"{i} is", "choices": [" even", " odd"], "gold": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "parity.yaml"
    path.write_text(
        f"task: parity\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return path


def same(first, second):
    return (
        all(first[key] == second[key] for key in ("results", "expectations")) and first["against"] == second["against"]
    )


def test_a_second_run_of_a_recipe_does_not_load_the_dense_model(llama, tmp_path, loads, parity):
    data = {
        "model": str(llama), "method": "lord", "ratio": 0.2, "output": str(tmp_path / "out"),
        "calibration": {"source": "python-docs", "samples": 2, "seqlen": 32}, "expect": ["kl <= 10"],
        "evaluate": {"tasks": [f"tasks:{parity}", "tokens:python-docs@32"], "against": "dense", "limit": 6},
    }  # fmt: skip
    out = str(tmp_path / "out")
    first = run_recipe(make_recipe(data)).report["evaluation"]
    assert loads == [out, str(llama)]
    assert first["against"]["tests"].keys() == {"parity", "tokens:python-docs@32"}
    loads.clear()
    second = run_recipe(make_recipe(data), overwrite=True).report["evaluation"]
    assert loads == [out]
    assert same(first, second)
    loads.clear()
    run_recipe(make_recipe({**data, "ratio": 0.5}), overwrite=True)  # the divergence from another model is another one
    assert loads == [out, str(llama)]
    loads.clear()
    data["evaluate"]["tasks"].pop()
    run_recipe(make_recipe({**data, "ratio": 0.4, "expect": []}), overwrite=True)
    assert loads == [out]


def test_whatever_decides_a_result_is_part_of_its_name(llama, tmp_path, loads, parity):
    dense = tmp_path / "dense"
    shutil.copytree(llama, dense)

    def found(**changes):
        loads.clear()
        spec = {"tasks": [f"tasks:{parity}", "tokens:python-docs@32"], "against": str(dense), "limit": 4, **changes}
        return evaluate(str(llama), EvaluateSpec(**spec))

    before = found()
    again = found()
    assert loads == [str(llama)]
    assert same(before, again)
    for changes in ({"limit": 5}, {"compute_dtype": "bfloat16"}, {"fewshot": 1}):
        found(**changes)
        assert loads == [str(llama), str(dense)], changes
    shutil.copytree(dense, tmp_path / "moved")
    found(against=str(tmp_path / "moved"))
    assert loads == [str(llama)]
    parity.write_text(parity.read_text().replace("'{{q}}'", "'Say: {{q}}'"))
    found()
    assert loads == [str(llama), str(dense)]
    tensors = load_file(dense / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * torch.linspace(0.5, 1.5, 32)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    after = found()
    assert loads == [str(llama), str(dense)]
    assert after["results"]["tokens:python-docs@32"]["kl"] > 1e-3


@pytest.mark.parametrize("rubbish", ["", "not JSON", "[]", '{"key": 1}', "wrong value"])
def test_broken_entries_are_ignored_and_written_again(llama, own_cache, loads, parity, rubbish):
    spec = EvaluateSpec(tasks=[f"tasks:{parity}", "tokens:python-docs@32"], against=str(llama), limit=2)
    first = evaluate(str(llama), spec)
    files = list((own_cache / "evaluations").iterdir())
    assert len(files) == 2
    whole = {path: path.read_text() for path in files}
    for path in files:
        path.write_text(
            json.dumps({**json.loads(whole[path]), "value": {"results": 3}}) if "value" in rubbish else rubbish
        )
    loads.clear()
    assert same(first, evaluate(str(llama), spec))
    assert len(loads) == 2
    assert {path: path.read_text() for path in (own_cache / "evaluations").iterdir()} == whole


def test_a_cache_that_cannot_be_written_is_no_error(own_cache):
    own_cache.write_text("a file")
    note({"a": 1}, "label", 2)
    assert recall({"a": 1}) is None


def test_the_digest_is_of_the_content(llama, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    (copy / "report.json").write_text("{}")
    (copy / "README.md").write_text("x")
    assert content_digest(copy) == content_digest(llama)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert content_digest(copy) != content_digest(llama)


def test_listing_and_clearing(llama, own_cache, tmp_path):
    other = tmp_path / "elsewhere"
    done = run_cli(
        "eval", llama, "--against", llama, "--tasks", "tokens:python-docs@32", "--limit", 2, "--cache", other
    )
    assert done.returncode == 0, done.stderr
    assert not own_cache.exists()
    (other / "mine.txt").write_text("keep")
    (other / "evaluations" / "mine.csv").write_text("keep")
    (other / "statistics" / "mine").mkdir(parents=True)
    converted = other / "converted" / ("0" * 16)
    converted.mkdir(parents=True)
    (converted / "w").write_bytes(bytes(1000))
    listed = json.loads(run_cli("cache", "--cache", other, "--json", "-", "--quiet").stdout)
    file = next((other / "evaluations").glob("*.json"))
    assert {(e["kind"], e["bytes"]) for e in listed["entries"]} == {
        ("converted", 1000),
        ("evaluations", file.stat().st_size),
    }
    assert listed["bytes"] == 1000 + file.stat().st_size
    cleared = run_cli("cache", "clear", "--cache", other)
    assert cleared.returncode == 0
    assert "2 entries" in cleared.stdout
    left = sorted(str(path.relative_to(other)) for path in other.rglob("*"))
    assert left == ["evaluations", "evaluations/mine.csv", "mine.txt", "statistics", "statistics/mine"]
    wrong = run_cli("cache", "--cache", other / "mine.txt")
    assert wrong.returncode == 2
    assert "is no folder" in wrong.stderr
