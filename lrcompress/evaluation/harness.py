"""Running lm-eval on a loaded model, quietly and offline where the data is local."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lrcompress.errors import InputError, nearest
from lrcompress.evaluation.loading import LoadedModel
from lrcompress.evaluation.tasks import Task
from lrcompress.evaluation.tokens import METRICS as TOKEN_METRICS
from lrcompress.evaluation.tokens import METRICS_OF_TWO
from lrcompress.evaluation.zero_shot import read_documents, zero_shot_task
from lrcompress.model.device import out_of_memory
from lrcompress.model.limits import longest_context
from lrcompress.recipe import EvaluateSpec

LONGEST = 2048
"""Longest window of lm-eval's rolling perplexity; a shorter context of the model wins."""

BOOTSTRAP = 1000
"""For standard errors of metrics that have no closed form; means have one."""

_PERPLEXITIES = [
    {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
    {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
    {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
]


@dataclass
class Measured:
    """Of one `text:`, `tasks:` or named task, by lm-eval's task names; metrics without its filter suffix.

    items: every metric's values for single documents, by document id; groups of tasks have none. asked: a digest of
    the tasks' definitions and of everything that the model was asked.
    """

    results: dict[str, dict[str, float]]
    items: dict[str, dict[str, dict[int, float]]]
    asked: str


def run_lm_eval(
    loaded: LoadedModel, task: Task, spec: EvaluateSpec, *, texts: Sequence[str], warn: Callable[[str], None]
) -> Measured:
    """Run one task of any kind but `tokens:`; texts: the documents of a `text:` task."""
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It would ask git and a dozen of other programs about this machine, and let them speak.
    evaluator.get_git_commit_hash, evaluator.add_env_info = (lambda: None), (lambda storage: None)
    context = longest_context(loaded.model.config) or LONGEST
    engine = HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=spec.batch_size,
        max_length=min(context, LONGEST),
    )  # fmt: skip
    asks = task.kind != "text"
    manager = _manager(task)
    names: list[Any]
    if task.kind == "text":
        names = [text_task(texts)]
    elif task.kind == "zero_shot":
        assert task.path is not None
        names = [zero_shot_task(_lm_evals_name(task), task.path, manager)]
    else:
        names = _names(task, manager)
    try:
        result = lm_eval.simple_evaluate(
            model=engine, tasks=names, task_manager=manager, limit=spec.limit, bootstrap_iters=BOOTSTRAP,
            num_fewshot=spec.fewshot if asks else None, apply_chat_template=spec.chat_template and asks,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"task {task.given} cannot be run ({reason})") from error
    for name, config in result["configs"].items():
        if _shows_answers(config):
            warn(
                f"{name} takes its few-shot examples from the questions, each of which may be its own example: "
                f"add fewshot_split: {config['test_split']} to the task"
            )
    return Measured(
        {_key(task, name): _metrics(values) for name, values in result["results"].items()},
        {_key(task, name): _items(samples) for name, samples in result["samples"].items()},
        _asked(result),
    )


@dataclass
class Measurable:
    """What tasks will measure: metrics by result name; `open` where what some task measures shows only when it runs."""

    known: dict[str, set[str]] = field(default_factory=dict)
    open: bool = False


def measurable(tasks: Sequence[Task], *, compared: bool) -> Measurable:
    """What the tasks measure of a model, `compared` with another or alone; nothing is loaded.

    InputError for a name that lm-eval does not know, and for a file that does not hold what its task reads.
    """
    found = Measurable()
    for task in tasks:
        if task.kind == "tokens":
            found.known[task.key] = {*TOKEN_METRICS, *(METRICS_OF_TWO if compared else ())}
        elif task.kind == "text":
            found.known[task.key] = _with_errors(str(entry["metric"]) for entry in _PERPLEXITIES)
        else:
            manager = _manager(task)
            if task.kind == "zero_shot":
                assert task.path is not None
                read_documents(_lm_evals_name(task), task.path)
            for name in [_lm_evals_name(task)] if task.kind == "zero_shot" else _names(task, manager):
                metrics = _declared(manager.task_index[name].cfg or {})
                if metrics is None:
                    found.open = True
                else:
                    found.known[_key(task, name)] = metrics
    return found


def _declared(config: dict[str, Any]) -> set[str] | None:
    """The metrics that a task's definition lists, None where it lists none: a group, or a task in Python."""
    listed = config.get("metric_list") or []
    if "class" in config or not listed or not all(isinstance(entry.get("metric"), str) for entry in listed):
        return None
    filters = [str(entry["name"]) for entry in config.get("filter_list") or [{"name": "none"}]]
    return {_metric(name, f) for f in filters for name in _with_errors(str(entry["metric"]) for entry in listed)}


def _with_errors(metrics: Iterable[str]) -> set[str]:
    return {name for metric in metrics for name in (metric, f"{metric}_stderr")}


def _manager(task: Task) -> Any:
    """Knows the definitions of a task's kind."""
    from lm_eval.tasks import TaskManager

    if task.kind == "text":
        return TaskManager(include_defaults=False)
    if task.kind == "folder":
        assert task.path is not None
        folder = task.path if task.path.is_dir() else task.path.parent
        return TaskManager(include_path=str(folder), include_defaults=False)
    return _beside(_lm_evals_name(task)) or _all_of_lm_eval()


@cache
def _beside(name: str) -> Any:
    """The definitions of the folder of lm-eval's where a file of the task's name defines it; None for other names."""
    from lm_eval import tasks

    for path in sorted(Path(tasks.__file__).parent.rglob(f"{name}.yaml")):
        manager = tasks.TaskManager(include_path=str(path.parent), include_defaults=False)
        if name in manager.all_subtasks:
            return manager
    return None


@cache
def _all_of_lm_eval() -> Any:
    """Made once: its index takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _names(task: Task, manager: Any) -> list[str]:
    """What lm-eval is to run for a `tasks:` or a named task; InputError where there is no such thing."""
    if task.kind == "folder":
        assert task.path is not None
        return _folder_names(manager, task.path)
    if task.given not in manager.all_tasks:
        raise InputError(f"unknown task {task.given!r}: {nearest(task.given, sorted(manager.all_tasks))}")
    return [task.given]


def _lm_evals_name(task: Task) -> str:
    return task.given.partition(":")[0]


def text_task(texts: Sequence[str]) -> dict[str, Any]:
    """An lm-eval task of rolling perplexity over documents."""
    import datasets

    return {
        "task": "text",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list([{"page": text} for text in texts])},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": _PERPLEXITIES,
    }


def _folder_names(manager: Any, path: Path) -> list[str]:
    """The tasks and groups of a folder, or those that one of its files defines; no task twice."""
    if not path.is_dir():
        names = [e.name for e in manager.task_index.values() if e.yaml_path and path.samefile(e.yaml_path)]
    else:
        inside: set[str] = set()
        for group in list(manager.all_groups):
            loaded = manager.load(group)
            inside |= {*loaded["tasks"], *loaded["groups"]} - {group}
        names = [name for name in [*manager.all_groups, *manager.all_subtasks] if name not in inside]
    if not names:
        raise InputError(f"{path} defines no lm-eval task")
    return names


def _shows_answers(config: dict[str, Any]) -> bool:
    """Whether lm-eval draws few-shot examples from the documents asked about without leaving out the one asked."""
    named = config.get("fewshot_config") or {}
    elsewhere = [config.get(key) for key in ("fewshot_split", "training_split", "validation_split")]
    return bool(config.get("num_fewshot") and config.get("test_split")) and not any(
        [*elsewhere, named.get("split"), named.get("samples")]
    )


def _key(task: Task, name: str) -> str:
    return task.key if task.kind in ("text", "zero_shot") else name


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none` becomes acc, `acc_stderr,none` acc_stderr; what is no number is left out."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and filter_name:
            found[_metric(name, filter_name)] = float(value)
    return found


def _items(samples: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            if isinstance(sample[name], int | float):
                found.setdefault(_metric(name, sample["filter"]), {})[sample["doc_id"]] = float(sample[name])
    return found


def _asked(result: Any) -> str:
    digest = hashlib.sha256()
    for name, config in sorted(result["configs"].items()):
        # A function in memory is written with its address; what it returns is in the samples.
        known = {key: value for key, value in config.items() if key not in ("custom_dataset", "metadata")}
        digest.update(json.dumps([name, known], sort_keys=True, default=str).encode())
    for name, samples in sorted(result["samples"].items()):
        for sample in samples:
            asked = [name, sample["doc_id"], sample["filter"], sample["arguments"], sample["target"]]
            digest.update(json.dumps(asked, default=str).encode())
    return digest.hexdigest()


def _metric(name: str, filter_name: str) -> str:
    return name if filter_name == "none" else f"{name}_{filter_name}"
