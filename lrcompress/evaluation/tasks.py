"""What the user asks to measure: `tokens:`, `text:`, `tasks:` and lm-eval's own names."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lrcompress.calibration.corpus import (
    BUILT_IN,
    Source,
    bos_prefix,
    cut_blocks,
    documents,
    parse_source,
    split_held_out,
    split_source,
    tokenise,
)
from lrcompress.calibration.own_text import sample_from_model
from lrcompress.errors import InputError
from lrcompress.evaluation.zero_shot import ZERO_SHOT, labels_file

Kind = Literal["tokens", "text", "folder", "zero_shot", "name"]


LENGTH = 512
"""Tokens of a block where a task is no more than a file of text."""


@dataclass(frozen=True)
class Task:
    """A task as given: `key` is its name in results, unique among the tasks of a call."""

    given: str
    key: str
    kind: Kind
    source: Source | None = None
    seqlen: int = 0
    path: Path | None = None

    @property
    def files(self) -> list[Path]:
        """Where its questions lie on this machine: files, or a folder of definitions."""
        labels = [] if self.path is None or self.kind != "zero_shot" else [labels_file(self.path)]
        return [path for path in (self.path, *labels) if path is not None and path.exists()]


def parse_tasks(given: Sequence[str]) -> list[Task]:
    """Check every task's form and files before anything loads; names of lm-eval's tasks are checked by lm-eval."""
    tasks = [_parse(text) for text in given]
    if not tasks:
        raise InputError("no task to evaluate: pass --tasks, such as tokens:python-docs@512")
    short = [task.key for task in tasks]
    return [t if short.count(t.key) == 1 else Task(t.given, t.given, t.kind, t.source, t.seqlen, t.path) for t in tasks]


def _parse(text: str) -> Task:
    kind, colon, rest = text.partition(":")
    if colon and kind == "tokens":
        spec, at, length = rest.rpartition("@")
        if not at or not length.isdigit() or not 2 <= int(length) < 2**31:
            raise InputError(f"task {text!r}: write tokens:SPEC@LENGTH, such as tokens:python-docs@512")
        source = parse_source(spec)
        return Task(text, f"tokens:{_short(source)}@{length}", "tokens", source, int(length))
    if colon and kind == "text":
        source = parse_source(rest)
        return Task(text, f"text:{_short(source)}", "text", source)
    if colon and kind == "tasks":
        path = Path(rest)
        if not path.exists():
            raise InputError(f"task {text!r}: {rest} does not exist")
        return Task(text, f"tasks:{path.name}", "folder", path=path)
    if colon and kind in ZERO_SHOT:
        path = Path(rest)
        if not path.is_file():
            raise InputError(f"task {text!r}: {rest} is no file: write {kind}:FILE.jsonl, or {kind} for the hub's data")
        return Task(text, f"{kind}:{path.name}", "zero_shot", path=path)
    spec, at, length = text.rpartition("@")
    name = spec if at and length.isdigit() else text
    if name not in BUILT_IN and os.path.isfile(split_source(name).name):  # of an impossible name Path would raise
        return _parse(f"tokens:{name}@{length if name == spec else LENGTH}")
    if not re.fullmatch(r"[\w.-]+", text):
        raise InputError(
            f"task {text!r} is not understood: a file of text, an lm-eval name, tokens:SPEC@LENGTH, text:SPEC, "
            f"tasks:PATH or one of {', '.join(ZERO_SHOT)} with :FILE.jsonl"
        )
    return Task(text, text, "name")


def _short(source: Source) -> str:
    return source.name if source.name in BUILT_IN else Path(source.name).name


OTHER_SPLITS = {"wikitext2": "test", "c4": "validation"}
"""Sources that are evaluated on another split than the one for calibration and training."""


def was_calibrated_on(source: Source, report: dict[str, Any] | None) -> bool:
    """Whether a checkpoint's report says that it was calibrated, or trained, on the text that this source evaluates."""
    if report is None or source.name == "self" or source.name in OTHER_SPLITS:
        return False
    specs = [str(c["source"]) for c in report["recipe"]["calibration"]]
    for spec in [*specs, *report.get("trained_on", [])]:
        name = split_source(spec).name
        same_file = source.path is not None and Path(name).exists() and Path(name).samefile(source.name)
        if name == source.name or same_file:
            return True
    return False


def task_blocks(
    task: Task, tokenizer: Any, folder: Path, *, held_out_only: bool, limit: int | None, seed: int = 0,
    trust_remote_code: bool = False,
) -> Tensor:  # fmt: skip
    """(blocks, seqlen) of a `tokens:` task: the text as it is, cut into disjoint blocks; the first `limit` of them."""
    assert task.source is not None
    prefix = bos_prefix(tokenizer)
    if task.source.name == "self":
        blocks = sample_from_model(
            folder, tokenizer, limit or 8, task.seqlen, seed + 1, trust_remote_code=trust_remote_code
        )
    else:
        ids = tokenise(evaluation_documents(task.source, tokenizer), tokenizer)
        blocks = cut_blocks(split_held_out(ids)[1] if held_out_only else ids, task.seqlen, prefix)
    if not len(blocks):
        raise InputError(
            f"task {task.given}: the text has no whole block of {task.seqlen} tokens: use a shorter length"
        )
    return blocks if limit is None else blocks[:limit]


def evaluation_documents(source: Source, tokenizer: Any) -> list[str]:
    """The documents to evaluate on: for wikitext2 the test split, in the usual joined form."""
    return documents(source, OTHER_SPLITS.get(source.name, "train"), tokenizer)
