"""Evaluating one model, or two on the same text, and judging expectations."""

import time
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrcompress.calibration.corpus import held_out_documents
from lrcompress.checkpoint.cache import content_digest
from lrcompress.checkpoint.folder import load_tokenizer
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.shards import remark
from lrcompress.errors import InputError
from lrcompress.evaluation.gates import Expectation, judge, parse_expectation
from lrcompress.evaluation.harness import Measured, measurable, run_lm_eval
from lrcompress.evaluation.loading import LoadedModel, load_model
from lrcompress.evaluation.remember import KeptScores, KeptTask, circumstances
from lrcompress.evaluation.significance import mcnemar_tests, paired_t
from lrcompress.evaluation.tasks import Task, evaluation_documents, parse_tasks, task_blocks, was_calibrated_on
from lrcompress.evaluation.tokens import METRICS_OF_TWO, Divergence, Losses, score, score_both
from lrcompress.foreign.opening import open_model
from lrcompress.model.device import memory_errors
from lrcompress.model.limits import known_tokens, length_warning
from lrcompress.recipe import EvaluateSpec
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import bits_stored, load_report

Results = dict[str, dict[str, Any]]
T = TypeVar("T")


def evaluate(
    model: str,
    spec: EvaluateSpec,
    expect: Sequence[str] = (),
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """The contract's eval JSON. Tasks and expectations are checked before a model is loaded."""
    reporter = reporter or Reporter(quiet=True)
    tasks = parse_tasks(spec.tasks)
    expectations = [parse_expectation(text) for text in expect]
    check_expectations(expectations, tasks, facts_of(open_model(model).folder), compared=spec.against is not None)
    options = {"device": device, "dtype": spec.compute_dtype, "trust_remote_code": trust_remote_code}
    both = _Comparison(model, tasks, spec, options, reporter)
    facts = facts_of(both.folders[0])
    against: dict[str, Any] | None = None
    with memory_errors(f"out of memory while {model} was evaluated: use shorter blocks or a smaller batch size"):
        seconds = {"model": _timed(both.run)}
        if spec.against is not None:
            seconds["against"] = _timed(both.compare)
            against = {"model": spec.against, "results": _flat(tasks, both.theirs), "tests": both.tests}
    results = _flat(tasks, both.ours)
    for measured in both.items.values():
        for name, items in measured.items.items():
            if items:  # groups of tasks have none
                results[name]["samples"] = max(map(len, items.values()))
    judged = [judge(expectation, results, facts, against and against["results"]) for expectation in expectations]
    return {
        "schema": 1,
        "model": model,
        "results": results,
        "against": against,
        "facts": facts,
        "expectations": judged,
        "seconds": seconds,
    }


class _Comparison:
    """One model, then a second one beside it.

    Only `tokens:` tasks need both at once, for their predictions are compared block by block: both models' weights and
    one block's logits of each are in memory. The first model is dropped before lm-eval runs the second.
    What the cache knows of the second model is not measured again; a model is loaded when it is first needed.
    """

    def __init__(
        self, model: str, tasks: Sequence[Task], spec: EvaluateSpec, options: dict[str, Any], reporter: Reporter
    ) -> None:
        self.spec, self.options, self.reporter = spec, options, reporter
        self.labels = [model] if spec.against is None else [model, spec.against]
        self.folders = [open_model(label).folder for label in self.labels]
        for said in filter(None, map(remark, self.folders)):
            reporter.warn(said)
        check_chat_template(spec, self.labels, trust_remote_code=options["trust_remote_code"])
        self.tokens = [task for task in tasks if task.kind == "tokens"]
        self.others = [task for task in tasks if task.kind != "tokens"]
        self.readers = {task.key: self._readers(task) for task in tasks}
        # All are read before the first is measured: one that is too short is found at once.
        self._written = {task.key: self._texts(task) for task in self.others}
        ready = [task for task in self.tokens if task.source is not None and task.source.name != "self"]
        self._cut: dict[tuple[int, str], Tensor] = {}
        for task in ready:
            self._cut |= {(place, task.key): self._blocks(place, task) for place in range(len(self.labels))}
        self.loaded: dict[int, LoadedModel] = {}
        self.ours: dict[str, Results] = {}
        self.theirs: dict[str, Results] = {}
        self.items: dict[str, Measured] = {}
        self.tests: dict[str, dict[str, dict[str, Any]]] = {}

    def run(self) -> None:
        """Measure the first model; where there is a second, its `tokens:` tasks wait for `compare`."""
        for task in self.others:
            self.items[task.key] = self._lm_eval(0, task)
            self.ours[task.key] = self.items[task.key].results
        if len(self.labels) == 1:
            for task in self.tokens:
                self.ours[task.key] = self._alone(0, task, self._blocks(0, task))

    def compare(self) -> None:
        """Measure the second model."""
        for task in self.tokens:
            self._together(task)
        self.loaded.pop(0, None)
        for task in self.others:
            theirs = self._second(task)
            self.theirs[task.key] = theirs.results
            for name, items in self.items[task.key].items.items():
                self._note(name, mcnemar_tests(items, theirs.items.get(name, {})))

    def _readers(self, task: Task) -> list[Path]:
        """The models that have read the task's text; where there is one, only its held-out end counts, for both."""
        source = task.source
        found = [f for f in self.folders if source is not None and was_calibrated_on(source, load_report(f))]
        if found:
            self.reporter.say(
                f"{task.key}: a model was calibrated or trained on this text: only its held-out last tenth counts"
            )
        return found

    def _texts(self, task: Task) -> list[str]:
        """The documents of a `text:` task."""
        if task.kind != "text":
            return []
        assert task.source is not None
        trust = self.options["trust_remote_code"]
        # Chats are written by the first model's template, for both.
        whole = texts = evaluation_documents(task.source, load_tokenizer(self.folders[0], trust_remote_code=trust))
        for folder in self.readers[task.key]:
            tokenizer = load_tokenizer(folder, trust_remote_code=trust)
            texts = min(texts, held_out_documents(whole, tokenizer), key=_length)
        if not texts:
            raise InputError(f"task {task.given}: nothing of its text is held out: use more text")
        return texts

    def _load(self, which: int) -> LoadedModel:
        if which not in self.loaded:
            self.reporter.say(f"loading {self.labels[which]}")
            self.loaded[which] = load_model(self.labels[which], **self.options)
        return self.loaded[which]

    def _lm_eval(self, which: int, task: Task) -> Measured:
        self.reporter.say(f"running {task.given}")
        return run_lm_eval(self._load(which), task, self.spec, texts=self._written[task.key], warn=self.reporter.warn)

    def _second(self, task: Task) -> Measured:
        kept = KeptTask(self._digests[1], task, self.items[task.key].asked, self._how)
        found = kept.read()
        if found is not None:
            self.reporter.say(f"{task.given} of {self.labels[1]}: from the cache")
            return found
        found = self._lm_eval(1, task)
        kept.write(f"{self.labels[1]}, {task.key}", found)
        return found

    @cached_property
    def _digests(self) -> list[str]:
        return [content_digest(folder) for folder in self.folders]

    @cached_property
    def _how(self) -> dict[str, Any]:
        return circumstances(self.spec, self.options["device"])

    def _blocks(self, which: int, task: Task) -> Tensor:
        if (which, task.key) in self._cut:
            return self._cut[which, task.key]
        folder = self.folders[which]
        trust = self.options["trust_remote_code"]
        tokenizer, held_out_only = load_tokenizer(folder, trust_remote_code=trust), bool(self.readers[task.key])
        return task_blocks(
            task, tokenizer, folder, held_out_only=held_out_only, limit=self.spec.limit, trust_remote_code=trust
        )

    def _alone(self, which: int, task: Task, blocks: Tensor) -> Results:
        model = self._load(which).model
        self._check_length(task, model, blocks)
        return {task.key: self._scored(task, blocks, lambda tick: score(model, blocks, tick)).metrics()}

    def _together(self, task: Task) -> None:
        blocks = self._blocks(0, task)
        # What the first model samples from itself is text for both.
        own = task.source is not None and task.source.name == "self"
        other = blocks if own else self._blocks(1, task)
        found = self._compared(task, blocks) if torch.equal(blocks, other) else None
        if found is None:
            self.reporter.say(f"{task.key}: the models' tokens differ, so their predictions cannot be compared")
            self.ours[task.key] = self._alone(0, task, blocks)
            self.theirs[task.key] = self._alone(1, task, other)
            return
        ours, theirs, apart = found
        self.ours[task.key] = {task.key: {**ours.metrics(), **apart.metrics()}}
        self.theirs[task.key] = {task.key: theirs.metrics()}
        test = paired_t(ours.blocks, theirs.blocks)
        self._note(task.key, {"token_perplexity": test} if test else {})

    def _compared(self, task: Task, blocks: Tensor) -> tuple[Losses, Losses, Divergence] | None:
        """None where the models have other vocabularies."""
        kept = KeptScores(self._digests, blocks, self._how)
        found = kept.read()
        if found is not None:
            self.reporter.say(f"{task.given} of both models: from the cache")
            return found
        mine, reference = self._load(0).model, self._load(1).model
        if known_tokens(mine) != known_tokens(reference):
            return None
        self._check_length(task, mine, blocks)
        found = self._scored(task, blocks, lambda tick: score_both(mine, reference, blocks, tick))
        kept.write(f"{self.labels[0]} against {self.labels[1]}, {task.key}", found)
        return found

    def _check_length(self, task: Task, model: Any, blocks: Tensor) -> None:
        warning = length_warning(model, blocks.shape[1])
        if warning:
            self.reporter.warn(f"{task.key}: {warning}")

    def _note(self, name: str, tests: dict[str, dict[str, Any]]) -> None:
        if tests:
            self.tests[name] = tests

    def _scored(self, task: Task, blocks: Tensor, run: Callable[[Callable[[], None]], T]) -> T:
        try:
            with self.reporter.phase(task.key, len(blocks)) as tick:
                return run(tick)
        except ArithmeticError as error:
            raise InputError(f"{task.given} on {' or '.join(self.labels)}: {error}") from error


def facts_of(folder: Path) -> dict[str, float]:
    """Of a model's files."""
    facts = {"bytes": float(CheckpointReader(folder).bytes)}
    report = load_report(folder)
    if report is not None:
        facts |= {"stored_ratio": float(report["ratio"]["stored"]), "bpw": bits_stored(report)}
    return facts


def check_expectations(
    expectations: Sequence[Expectation], tasks: Sequence[Task], facts: Collection[str], *, compared: bool
) -> None:
    """InputError for a task that cannot be run, or a metric that will not be measured, before anything is."""
    found = measurable(tasks, compared=compared)
    ours = {name: dict.fromkeys(metrics, 1.0) for name, metrics in found.known.items()}
    theirs = {name: {m: 1.0 for m in metrics if m not in METRICS_OF_TWO} for name, metrics in ours.items()}
    for expectation in expectations:
        named = [m for name, m in found.known.items() if expectation.task in (None, name)]
        if found.open and not any(expectation.metric in metrics for metrics in named):
            continue  # it may be of a task that does not say before it runs what it measures
        judge(expectation, ours, dict.fromkeys(facts, 1.0), theirs if compared else None)


def check_chat_template(spec: EvaluateSpec, models: Sequence[str], *, trust_remote_code: bool) -> None:
    """InputError where a chat template is asked for and a model's tokenizer has none."""
    for model in models if spec.chat_template else []:
        if not load_tokenizer(open_model(model).folder, trust_remote_code=trust_remote_code).chat_template:
            raise InputError(f"model {model} has no chat template: evaluate it without one")


def _length(texts: Sequence[str]) -> int:
    return sum(map(len, texts))


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _flat(tasks: Sequence[Task], measured: dict[str, Results]) -> Results:
    """Results of all tasks, in the order in which they were asked."""
    return {name: values for task in tasks for name, values in measured[task.key].items()}
