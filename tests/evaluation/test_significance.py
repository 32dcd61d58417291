"""Paired tests and standard errors against sums by hand and lm-eval's own samples."""

import io
import json
import math
import random

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from scipy.stats import ttest_rel
from transformers import AutoTokenizer

from lrcompress.cli.show import evaluation_table
from lrcompress.evaluation.compare import evaluate
from lrcompress.evaluation.loading import load_model
from lrcompress.evaluation.significance import mcnemar, mcnemar_tests, paired_t
from lrcompress.evaluation.tokens import score
from lrcompress.recipe import EvaluateSpec
from lrcompress.report.measured import metric_rows
from tests.conftest import compress_tiny


def test_mcnemar_is_a_binomial_sum_over_the_items_that_differ():
    ours = [1] * 9 + [0] * 2 + [1] * 30 + [0] * 5
    theirs = [0] * 9 + [1] * 2 + [1] * 30 + [0] * 5
    expected = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    found = mcnemar(ours, theirs)
    assert found == {"p_value": pytest.approx(expected), "significant": False, "n": 46}
    assert mcnemar(theirs, ours)["p_value"] == pytest.approx(expected)
    assert mcnemar([1] * 12, [0] * 12) == {"p_value": pytest.approx(2 / 2**12), "significant": True, "n": 12}
    assert mcnemar([1, 0], [1, 0])["p_value"] == 1.0


def test_items_are_matched_by_their_ids():
    ours = {"acc": {i: 1.0 for i in range(10)}, "loss": {0: 0.5}}
    theirs = {"acc": {i: 0.0 for i in range(9, 2, -1)}, "loss": {0: 0.5}}
    assert mcnemar_tests(ours, theirs) == {"acc": {"p_value": pytest.approx(2 / 2**7), "significant": True, "n": 7}}
    assert mcnemar_tests(ours, {}) == {}


def test_paired_t_agrees_with_flipped_signs():
    random.seed(0)
    ours = [random.gauss(2, 1) for _ in range(12)]
    theirs = [x + random.gauss(0.15, 0.25) for x in ours]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    flips = [sum(d if mask >> i & 1 else -d for i, d in enumerate(differences)) for mask in range(1 << 12)]
    by_flipping = sum(abs(f) >= abs(sum(differences)) - 1e-12 for f in flips) / len(flips)
    found = paired_t(ours, theirs)
    assert found["n"] == 12
    assert found["p_value"] == pytest.approx(by_flipping, rel=0.25)
    assert 0.001 < found["p_value"] < 0.5
    assert paired_t([1.0], [2.0]) is None
    assert paired_t([1.0, 2.0], [1.0, 2.0]) == {"p_value": 1.0, "significant": False, "n": 2}
    assert paired_t([2.0, 3.0], [1.0, 2.0]) == {"p_value": 0.0, "significant": True, "n": 2}


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    """A multiple-choice task of 40 documents."""
    folder = tmp_path_factory.mktemp("tasks")
    words = "red blue stone river tree house bird light night wind".split()
    rows = [
        {
            "q": f"{words[i % 10]} and {words[i % 7]} make",
            "choices": [f" {words[(i + k * k) % 10]}" for k in (1, 2, 3)],
            "gold": i % 3,
        }
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "times.yaml").write_text(
        f"task: times\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder / "times.yaml"


def test_against_the_dense_model(llama, task_file, text, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text[:20000], encoding="utf8", newline="\n")
    small = compress_tiny(llama, tmp_path / "small", method={"name": "lord", "metric": "plain"}, ratio=0.7).folder
    tasks = [f"tasks:{task_file}", f"tokens:{path}@64"]
    found = evaluate(str(small), EvaluateSpec(tasks=tasks, against=str(llama), limit=30))
    right = {}
    for folder in (small, llama):
        loaded = load_model(str(folder))
        engine = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
        manager = TaskManager(include_path=str(task_file.parent), include_defaults=False)
        right[folder] = lm_eval.simple_evaluate(model=engine, tasks=["times"], task_manager=manager, limit=30)[
            "samples"
        ]["times"]
    tests = found["against"]["tests"]
    for metric in ("acc", "acc_norm"):
        pairs = [(a[metric], b[metric]) for a, b in zip(right[small], right[llama], strict=True)]
        won, lost = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
        assert won + lost > 0
        tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
        assert tests["times"][metric]["p_value"] == pytest.approx(min(1.0, 2 * tail))
        assert tests["times"][metric]["n"] == 30
    blocks = [
        score(load_model(str(f)).model, first_blocks(llama, text, 64, 30), lambda: None).blocks for f in (small, llama)
    ]
    entry = tests["tokens:a.txt@64"]["token_perplexity"]
    assert entry["p_value"] == pytest.approx(ttest_rel(*blocks).pvalue, rel=1e-3)
    assert entry["n"] == 30
    assert entry["significant"] is (entry["p_value"] < 0.05)
    check_tables(found)


def first_blocks(folder, text, length, count):
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    return torch.tensor(ids[: count * length]).view(count, length)


def check_tables(found):
    """Errors stand beside the values, not in rows of their own; a difference by chance is dim."""
    table = evaluation_table(found)
    metrics = [("times", "acc"), ("times", "acc_norm"), ("tokens:a.txt@64", "token_perplexity")]
    columns = {str(column.header): list(column.cells) for column in table.columns}
    names = ["acc", "acc_norm", "token_perplexity", "kl", "kl_median", "kl_p90", "kl_floor", "top1"]
    assert columns["task, metric"] == [
        "times (30 samples)", *(f" {name}" for name in names[:2]), "tokens:a.txt@64 (30 blocks)", *(f" {name}" for name in names[2:])
    ]  # fmt: skip
    rows = {name.strip(): place for place, name in enumerate(columns["task, metric"])}
    error = found["results"]["times"]["acc_stderr"]
    assert columns["value"][1].endswith(f"±{error:.4f}")
    for name, metric in metrics:
        cell, test = columns["differs"][rows[metric]], found["against"]["tests"][name][metric]
        assert cell.removeprefix("[dim]").startswith("yes, p " if test["significant"] else "no, p ")
        assert cell.startswith("[dim]") is not test["significant"]
    assert all(" ±" in columns["value"][rows[name]] for name in ("token_perplexity", "kl", "top1"))
    assert columns["differs"][rows["kl"]] == ""
    rows = metric_rows(found)
    assert [("significant |" in row) for row in rows] == [False, False, True, True, True] + 5 * [False]
    assert len(rows) == 2 + 8
    assert all(row.count("|") == 6 for row in rows)


def test_the_table_takes_80_columns_and_loses_nothing():
    task, other = "tokens:a-text-of-a-long-name.txt@1024", "multiple_choice_task"
    ours = {"token_perplexity": 234.5678, "token_perplexity_stderr": 10.5123, "kl": 0.5, "kl_stderr": 0.001}
    found = {
        "model": "org/name-auto-3", "results": {task: ours, other: {"acc": 0.25}},
        "against": {
            "model": "org/name", "results": {task: {**ours, "token_perplexity": 25.5}, other: {"acc": 0.5}},
            "tests": {task: {"token_perplexity": {"p_value": 1e-9, "significant": True}},
                      other: {"acc": {"p_value": 0.213, "significant": False}}},
        },
    }  # fmt: skip
    for width in (80, 120):
        console = Console(width=width, file=io.StringIO(), soft_wrap=width > 80)
        console.print(evaluation_table(found))
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        names = "".join(line[:17].strip() for line in text.splitlines())
        for part in (task, "token_perplexity", other):
            assert part in names
        for part in ("234.5678 ±10.5123", "25.5000 ±10.5123", "x9.199", "yes, p < 0.0001", "no, p = 0.21", "-0.2500"):
            assert part in text
        assert "org/name" in text
        assert "…" not in text
