"""Evaluating one model, or two on the same text, and judging expectations."""

import time
from collections.abc import Sequence
from typing import Any

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.evaluation.gates import judge, parse_expectation
from lrcompress.evaluation.harness import run_lm_eval
from lrcompress.evaluation.loading import LoadedModel, load_model
from lrcompress.evaluation.tasks import Task, parse_tasks, task_blocks, token_perplexity, was_calibrated_on
from lrcompress.recipe import EvaluateSpec
from lrcompress.report.progress import Reporter


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
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    options = {"device": device, "dtype": spec.compute_dtype, "trust_remote_code": trust_remote_code}
    report, facts, results = _measure(model, tasks, spec, options, reporter, None)
    seconds["model"] = time.perf_counter() - started
    against: dict[str, Any] | None = None
    if spec.against is not None:
        started = time.perf_counter()
        against = {"model": spec.against, "results": _measure(spec.against, tasks, spec, options, reporter, report)[2]}
        seconds["against"] = time.perf_counter() - started
    other = against["results"] if against else None
    judged = [judge(expectation, results, facts, other) for expectation in expectations]
    return {
        "schema": 1,
        "model": model,
        "results": results,
        "against": against,
        "facts": facts,
        "expectations": judged,
        "seconds": seconds,
    }


def _measure(
    model: str,
    tasks: Sequence[Task],
    spec: EvaluateSpec,
    options: dict[str, Any],
    reporter: Reporter,
    calibrated: dict[str, Any] | None,
) -> tuple[dict[str, Any] | None, dict[str, float], dict[str, dict[str, float]]]:
    """Report, facts and results of one model; of text it (or `calibrated`) was calibrated on, only the held-out end."""
    reporter.say(f"loading {model}")
    loaded = load_model(model, **options)
    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        held = task.source is not None and was_calibrated_on(task.source, calibrated or loaded.report)
        if held:
            reporter.say(f"{task.key}: the model was calibrated on this text, so only its held-out last tenth counts")
        results.update(_run(loaded, task, spec, held, reporter))
    return loaded.report, _facts(loaded), results


def _run(
    loaded: LoadedModel, task: Task, spec: EvaluateSpec, held_out_only: bool, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    if task.kind != "tokens":
        reporter.say(f"running {task.given}")
        return run_lm_eval(loaded, task, limit=spec.limit, batch_size=spec.batch_size, held_out_only=held_out_only)
    blocks = task_blocks(task, loaded.tokenizer, loaded.folder, held_out_only=held_out_only, limit=spec.limit)
    try:
        with reporter.phase(task.key, len(blocks)) as tick:
            return {task.key: token_perplexity(loaded.model, blocks, tick)}
    except ArithmeticError as error:
        raise InputError(f"{task.given} on {loaded.label}: {error}") from error


def _facts(loaded: LoadedModel) -> dict[str, float]:
    facts = {"bytes": float(CheckpointReader(loaded.folder).bytes)}
    if loaded.report is not None:
        facts["stored_ratio"] = float(loaded.report["ratio"]["stored"])
    return facts
