#!/usr/bin/env python3
"""Zero-shot accuracy of checkpoints beside the dense model: ARC-Easy, PIQA and HellaSwag from local files, by lm-eval.

DATA has arc/arc_easy_test.jsonl (question, choices, label), piqa/valid.jsonl (goal, sol1, sol2) with
piqa/valid-labels.lst, and hellaswag/hellaswag_val.jsonl (query, endings, label). Prints accuracy ± standard error of
every model, and in how many of them the difference from the first model lies.

usage: zero_shot.py --data DATA [--limit 500] DENSE CHECKPOINT ...
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import yaml

from lrcompress.evaluation.compare import evaluate
from lrcompress.recipe import EvaluateSpec

TASKS = {
    "arc_easy": {
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}",
    },
    "piqa": {
        "doc_to_text": "Question: {{goal}}\nAnswer:", "doc_to_choice": "{{[sol1, sol2]}}", "doc_to_target": "{{label}}",
    },
    "hellaswag": {"doc_to_text": "{{query}}", "doc_to_choice": "{{endings}}", "doc_to_target": "{{label}}"},
}  # fmt: skip


def write_tasks(data: Path, folder: Path) -> None:
    """A task file of lm-eval for each of TASKS, with its documents beside it."""
    labels = (data / "piqa/valid-labels.lst").read_text().split()
    questions = [json.loads(line) for line in (data / "piqa/valid.jsonl").read_text().splitlines()]
    documents = {
        "arc_easy": (data / "arc/arc_easy_test.jsonl").read_text(),
        "piqa": "\n".join(json.dumps({**q, "label": int(n)}) for q, n in zip(questions, labels, strict=True)),
        "hellaswag": (data / "hellaswag/hellaswag_val.jsonl").read_text(),
    }
    for name, text in documents.items():
        path = folder / f"{name}.jsonl"
        path.write_text(text)
        metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
        task = {
            "task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "output_type": "multiple_choice", "metric_list": metrics, **TASKS[name],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(args.data, Path(folder))
        spec = EvaluateSpec(tasks=[f"tasks:{folder}"], limit=args.limit)
        found = {model: evaluate(model, spec)["results"] for model in args.models}
    print(f"`{' '.join(sys.argv)}`\n\n| model | task | accuracy | ± | from the first, in ± |\n|---|---|---|---|---|")
    first = found[args.models[0]]
    for model, results in found.items():
        for task, values in results.items():
            metric = "acc_norm" if task.endswith("hellaswag") else "acc"
            value, error = values[metric], values[f"{metric}_stderr"]
            apart = (value - first[task][metric]) / error
            print(f"| {model} | {task} ({metric}) | {value:.3f} | {error:.3f} | {apart:+.1f} |")


if __name__ == "__main__":
    main()
