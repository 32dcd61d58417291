"""Zero-shot tasks over local files agree with lm-eval's own definitions on the same documents."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.models.huggingface import HFLM

from lrcompress.errors import InputError
from lrcompress.evaluation import harness
from lrcompress.evaluation.compare import evaluate
from lrcompress.evaluation.loading import load_model
from lrcompress.evaluation.tasks import parse_tasks
from lrcompress.evaluation.zero_shot import read_documents
from lrcompress.recipe import EvaluateSpec

QUESTIONS = [
    ("Which of these is a colour", ["stone", "red", "river", "to run"], 1),
    ("What do bees make", ["honey", "iron", "glass", "paper boats"], 0),
    ("How many legs has a spider", ["two", "four", "eight", "none at all"], 2),
]
PIQA = [("Boil water", "put it on a stove", "put it in a freezer", 0), ("Cut paper", "use a spoon", "use scissors", 1)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return path


def arc_layouts(tmp_path):
    """The same questions as plain lists, as the original file, and as the hub's rows."""
    letters = "ABCD"
    plain = [{"question": q, "choices": c, "label": n} for q, c, n in QUESTIONS]
    original = [
        {"question": {"stem": q, "choices": [{"text": t, "label": k} for t, k in zip(c, letters, strict=True)]}, "answerKey": letters[n]}
        for q, c, n in QUESTIONS
    ]  # fmt: skip
    hub = [
        {"question": q, "choices": {"text": c, "label": list(letters)}, "answerKey": letters[n]}
        for q, c, n in QUESTIONS
    ]
    return [
        write(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("plain", plain), ("original", original), ("hub", hub))
    ]


def by_lm_eval(model, name, files):
    """lm-eval's own task with its json loader in place of the hub's data set."""
    loaded = load_model(str(model))
    folder = Path(lm_eval.tasks.__file__).parent / name.partition("_")[0]
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    config = dict(manager.task_index[name].cfg)
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(files)}}}
    config |= {"training_split": None, "validation_split": None, "test_split": "test"}
    config.pop("tag", None)
    engine = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    found = lm_eval.simple_evaluate(model=engine, tasks=[config], task_manager=manager, bootstrap_iters=0)
    found = found["results"][name]
    return {key: found[f"{key},none"] for key in ("acc", "acc_norm")}


def test_arc_in_every_layout_equals_lm_evals_own(llama, tmp_path):
    files = arc_layouts(tmp_path)
    expected = by_lm_eval(llama, "arc_easy", files[2])
    for path in files:
        result = evaluate(str(llama), EvaluateSpec(tasks=[f"arc_easy:{path}"]))["results"][f"arc_easy:{path.name}"]
        assert {key: result[key] for key in expected} == expected
        assert "acc_stderr" in result


def test_piqa_reads_its_labels_from_the_file_beside(llama, tmp_path):
    path = write(tmp_path / "valid.jsonl", [{"goal": g, "sol1": a, "sol2": b} for g, a, b, _ in PIQA])
    (tmp_path / "valid-labels.lst").write_text("".join(f"{n}\n" for *_, n in PIQA))
    together = write(tmp_path / "all.jsonl", [{"goal": g, "sol1": a, "sol2": b, "label": n} for g, a, b, n in PIQA])
    result = evaluate(str(llama), EvaluateSpec(tasks=[f"piqa:{path}"]))["results"]["piqa:valid.jsonl"]
    expected = by_lm_eval(llama, "piqa", together)
    assert {key: result[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "alone"), [("hellaswag", True), ("arc_challenge", True), ("mmlu", False), ("ai2_arc", False), ("x", False)]
)
def test_all_of_lm_eval_is_read_for_a_task_without_a_file_of_its_name_only(monkeypatch, name, alone):
    """The index of all tasks takes seconds; a group, a tag and an unknown name need it."""
    monkeypatch.setattr(harness, "_all_of_lm_eval", lambda: "all")
    found = harness._manager(parse_tasks([name])[0])
    assert (found != "all") is alone
    assert not alone or found.task_index[name].cfg["task"] == name


def test_hellaswag_and_openbookqa_documents(tmp_path):
    hub = {
        "ctx_a": "A man sits.",
        "ctx_b": "he",
        "activity_label": "Roof",
        "endings": ["is [x] up", "goes [title] on"],
        "label": "1",
    }
    ready = {"query": "Roof: A man sits. He", "endings": ["is up", "goes. on"], "label": 1}
    paths = [write(tmp_path / f"{n}.jsonl", [row]) for n, row in (("hub", hub), ("ready", ready))]
    first, second = (read_documents("hellaswag", path)[0] for path in paths)
    assert first == second == {"query": "Roof: A man sits. He", "choices": ["is up", "goes. on"], "label": 1}
    original = {
        "question": {"stem": "Sun", "choices": [{"text": "hot", "label": "A"}, {"text": "cold", "label": "B"}]},
        "answerKey": "A",
    }
    found = read_documents("openbookqa", write(tmp_path / "obqa.jsonl", [original]))[0]
    assert found == {
        "question_stem": "Sun",
        "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": "A",
    }


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no file"):
        parse_tasks([f"arc_easy:{tmp_path / 'missing.jsonl'}"])
    path = write(tmp_path / "bad.jsonl", [{"goal": "x"}])
    with pytest.raises(InputError, match="is not piqa: a record lacks 'sol1'"):
        read_documents("piqa", path)
