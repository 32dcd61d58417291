"""How lm-eval's questions are put: few-shot, chat template; and groups of tasks."""

import json
import shutil

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from lrcompress.errors import InputError
from lrcompress.evaluation.compare import evaluate
from lrcompress.evaluation.tasks import parse_tasks
from lrcompress.recipe import EvaluateSpec, make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.run import run_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks of unequal size and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, count, more in (("parity", 9, "fewshot_split: test\n"), ("thirds", 4, "")):
        rows = [{"q": f"{name} {i} is", "choices": [" even", " odd"], "gold": i % 2} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
            f"doc_to_target: gold\nmetric_list: [{{metric: acc}}]\n{more}"
        )
    (folder / "both.yaml").write_text(
        "group: both\ntask:\n  - parity\n  - thirds\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


def test_a_group_has_results_of_its_own_beside_its_members(llama, folder):
    found = evaluate(str(llama), EvaluateSpec(tasks=[f"tasks:{folder / 'both.yaml'}"], against=str(llama)))
    results = found["results"]
    assert results.keys() == {"both", "parity", "thirds"}
    assert results["both"]["acc"] == pytest.approx((9 * results["parity"]["acc"] + 4 * results["thirds"]["acc"]) / 13)
    assert found["against"]["tests"].keys() == {"parity", "thirds"}
    assert evaluate(str(llama), EvaluateSpec(tasks=[f"tasks:{folder}"]))["results"] == results


def test_examples_and_the_chat_template_reach_the_model(llama, folder, tmp_path, monkeypatch):
    chatty = tmp_path / "chatty"
    shutil.copytree(llama, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
    tokenizer.save_pretrained(chatty)
    asked, real = [], HFLM.loglikelihood

    def loglikelihood(self, requests, **options):
        asked.extend(request.args for request in requests)
        return real(self, requests, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
    spec = EvaluateSpec(tasks=[f"tasks:{folder / 'parity.yaml'}"], fewshot=2, chat_template=True, limit=3)
    reporter = Reporter(quiet=True)
    evaluate(str(chatty), spec, reporter=reporter)
    assert not reporter.warnings
    assert len(asked) == 3 * 2
    for i, (context, choice) in enumerate(asked):
        question = f"parity {i // 2} is"
        assert context.startswith("<user>parity ")
        assert context.endswith(f"<user>{question}</><assistant>")
        assert context.count("<user>") == 3
        assert context.count(question) == 1, "the question's own answer is no example"
        assert choice.strip() == ("even", "odd")[i % 2]


def test_local_zero_shot_files_and_tasks_that_would_show_an_answer(llama, folder, tmp_path, monkeypatch):
    rows = [{"question": f"What is {i}", "choices": ["even", "odd"], "label": i % 2} for i in range(4)]
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked, real = [], HFLM.loglikelihood

    def loglikelihood(self, requests, **options):
        asked.extend(request.args[0] for request in requests)
        return real(self, requests, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
    reporter = Reporter(quiet=True)
    tasks = [f"arc_easy:{tmp_path / 'arc.jsonl'}", f"tasks:{folder / 'thirds.yaml'}"]
    evaluate(str(llama), EvaluateSpec(tasks=tasks[:1], fewshot=3), reporter=reporter)
    assert [context.count("What is") for context in asked] == [4] * 8
    assert all(context.count(f"What is {i // 2}") == 1 for i, context in enumerate(asked))
    assert not reporter.warnings
    evaluate(str(llama), EvaluateSpec(tasks=tasks[1:], fewshot=1), reporter=reporter)
    assert "fewshot_split: test" in reporter.warnings[0]
    assert "thirds" in reporter.warnings[0]


def test_a_model_without_a_template_is_refused_before_anything_is_compressed(llama, folder, tmp_path):
    data = {
        "model": str(llama), "method": "lord", "ratio": 0.2, "output": str(tmp_path / "out"),
        "evaluate": {"tasks": [f"tasks:{folder}"], "chat_template": True},
    }  # fmt: skip
    with pytest.raises(InputError, match="no chat template"):
        run_recipe(make_recipe(data))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no chat template"):
        evaluate(str(llama), EvaluateSpec(**data["evaluate"]))


def test_a_file_of_text_is_a_task(tmp_path):
    text = tmp_path / "some text.txt"
    text.write_text("words")
    for given, length in ((f"{text}@64", 64), (str(text), 512)):
        (task,) = parse_tasks([given])
        assert (task.kind, task.seqlen, task.source.path) == ("tokens", length, text)
    for given in ("no such.txt", "x" * 5000 + ".txt/", "a\0b"):
        with pytest.raises(InputError, match="not understood"):
            parse_tasks([given])
    with pytest.raises(InputError, match="^text missing.txt does not exist"):
        parse_tasks(["tokens:missing.txt@64"])
