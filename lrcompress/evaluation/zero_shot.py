"""The standard zero-shot tasks over local files: lm-eval's own definitions, the documents from disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrcompress.calibration.files import read_records, read_text
from lrcompress.errors import InputError

Record = dict[str, Any]
LABELS = "ABCDEFGH"


def _arc(record: Record) -> Record:
    """Of the original file (question.stem, question.choices), the hub's rows, or plain lists of choices."""
    question, choices = record["question"], record.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, dict):  # the hub's layout
        return {"question": question, "choices": choices, "answerKey": record["answerKey"]}
    assert choices is not None
    if isinstance(choices[0], dict):
        labels, texts, key = [c["label"] for c in choices], [c["text"] for c in choices], record["answerKey"]
    else:
        labels, texts = list(LABELS[: len(choices)]), list(choices)
        key = labels[record["label"]]
    return {"question": question, "choices": {"label": labels, "text": texts}, "answerKey": key}


def _openbookqa(record: Record) -> Record:
    if "question_stem" in record:
        return record
    found = _arc(record)
    return {"question_stem": found["question"], "choices": found["choices"], "answerKey": found["answerKey"]}


def _piqa(record: Record) -> Record:
    return {"goal": record["goal"], "sol1": record["sol1"], "sol2": record["sol2"], "label": int(record["label"])}


def _hellaswag(record: Record) -> Record:
    """Of the hub's rows, or rows whose query and endings are preprocessed already."""
    if "query" in record:
        return {"query": record["query"], "choices": record["endings"], "label": int(record["label"])}
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = record["ctx_a"] + " " + record["ctx_b"].capitalize()
    endings = [preprocess(ending) for ending in record["endings"]]
    query = preprocess(record["activity_label"] + ": " + context)
    return {"query": query, "choices": endings, "label": int(record["label"])}


ZERO_SHOT: dict[str, Callable[[Record], Record]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
}
"""Task name of lm-eval to what makes one of its documents of a record on disk."""


def labels_file(path: Path) -> Path:
    """Where the labels of a .jsonl lie that holds none itself."""
    return path.with_name(f"{path.stem}-labels.lst")


def read_documents(name: str, path: Path) -> list[Record]:
    """The documents of a .jsonl; PIQA's labels may lie beside it in NAME-labels.lst, as published."""
    try:
        records = read_records(path)
        labels = labels_file(path)
        if labels.exists():
            marks = read_text(labels).split()
            records = [record | {"label": mark} for record, mark in zip(records, marks, strict=True)]
        return [ZERO_SHOT[name](record) for record in records]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as {name}: {error}") from error
    except (KeyError, TypeError, IndexError, AssertionError) as error:
        raise InputError(f"{path} is not {name}: a record lacks {error}") from error


def zero_shot_task(name: str, path: Path, manager: Any) -> dict[str, Any]:
    """lm-eval's task `name` with the documents of `path`; prompt, choices and metrics are lm-eval's."""
    import datasets

    rows = read_documents(name, path)
    config = dict(manager.task_index[name].cfg)
    for key in ("tag", "dataset_path", "dataset_name", "training_split", "validation_split", "process_docs"):
        config.pop(key, None)
    return config | {
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "fewshot_split": "test",  # where lm-eval is told so, it leaves the question itself out of its examples
    }
