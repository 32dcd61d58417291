"""A recipe run to its end: compressed, evaluated, its expectations judged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.folder import load_tokenizer, read_config_file
from lrcompress.errors import InputError, LrcompressError
from lrcompress.evaluation.compare import check_chat_template, check_expectations, evaluate
from lrcompress.evaluation.gates import parse_expectation
from lrcompress.evaluation.tasks import Task, parse_tasks, task_blocks, was_calibrated_on
from lrcompress.foreign.opening import check_model, open_model
from lrcompress.parallel.processes import processes
from lrcompress.pipeline import Result, compress_request
from lrcompress.recipe import EvaluateSpec, Recipe, make_recipe
from lrcompress.report.card import write_card
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import load_report
from lrcompress.stages.request import Request, check_request
from lrcompress.stages.workspace import model_identity, write_json


def check_run(recipe: Recipe) -> Request:
    """Its names looked up; InputError for all that can be seen to be wrong before its model is loaded."""
    expectations = [parse_expectation(text) for text in recipe.expect]
    spec = recipe.evaluate
    request = check_request(recipe)
    if spec is None:
        if expectations:
            raise InputError("the recipe expects something but evaluates nothing: add evaluate: {tasks: [...]}")
        return request
    tasks = parse_tasks(spec.tasks)
    other = recipe.model if spec.against in (None, "dense") else spec.against
    if other != recipe.model:
        read_config_file(open_model(other).folder)
    check_chat_template(spec, [recipe.model, other], trust_remote_code=recipe.trust_remote_code)
    check_expectations(expectations, tasks, ("bytes", "stored_ratio", "bpw"), compared=spec.against is not None)
    _check_texts(tasks, recipe, spec)
    return request


def _check_texts(tasks: Sequence[Task], recipe: Recipe, spec: EvaluateSpec) -> None:
    """InputError where a text holds no whole block of tokens, known before anything is compressed."""
    trust, calibrated = recipe.trust_remote_code, {"recipe": recipe.model_dump(mode="json")}
    for task in tasks:
        if task.kind == "tokens" and task.source is not None and task.source.name != "self":
            folder = open_model(recipe.model).folder
            task_blocks(
                task, load_tokenizer(folder, trust_remote_code=trust), folder, limit=spec.limit,
                held_out_only=was_calibrated_on(task.source, calibrated), trust_remote_code=trust,
            )  # fmt: skip


def measure(
    model: str,
    spec: EvaluateSpec,
    expect: Sequence[str] = (),
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """`evaluate`, and what it found kept in report and card of MODEL where that is a checkpoint of ours.

    Without `against` it is compared with the model that it was made from, where that is at hand and unchanged.
    """
    reporter, folder = reporter or Reporter(quiet=True), check_model(model)
    report = load_report(folder) if folder is not None and folder.is_dir() else None
    if report is not None and spec.against is None and (dense := _made_from(report)):
        reporter.say(f"comparing with {dense}, which it was made from")
        spec = spec.model_copy(update={"against": dense})
    if spec.against == "none":
        spec = spec.model_copy(update={"against": None})
    found = evaluate(model, spec, expect, device=device, trust_remote_code=trust_remote_code, reporter=reporter)
    if report is not None and folder is not None:
        _keep(found, report, folder, reporter)
    return found


def _made_from(report: dict[str, Any]) -> str | None:
    """The model that a checkpoint was made from, None where it is not on this machine as it was then."""
    model, made_from = report["recipe"].get("model"), report.get("made_from")
    if not isinstance(model, str) or not isinstance(made_from, dict):
        return None
    try:
        here = check_model(model) is not None and model_identity(model) == made_from.get("model files")
    except InputError:
        return None
    return model if here else None


def _keep(found: dict[str, Any], report: dict[str, Any], folder: Path, reporter: Reporter) -> None:
    """Beside what was measured before, but for that against another model: one table has one to compare with."""
    before = report.get("evaluation")
    if isinstance(before, dict):
        sides = [side for side in (before.get("against"), found["against"]) if side]
        if len({side["model"] for side in sides}) < 2:
            found = {**found, "results": {**before["results"], **found["results"]}, "against": _joined(before, found)}
    try:
        write_json(folder / "report.json", {**report, "evaluation": found})
        write_card(folder, {**report, "evaluation": found}, make_recipe(report["recipe"], str(folder / "report.json")))
    except (OSError, LrcompressError) as error:
        reporter.warn(f"what was measured is not kept in {folder} ({error})")


def _joined(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any] | None:
    """The `against` of both evaluations; what was measured again counts alone."""
    one, other = before.get("against"), found["against"]
    if not one:
        return other
    again = found["results"].keys()
    kept = {
        key: {task: value for task, value in one.get(key, {}).items() if task not in again}
        for key in ("results", "tests")
    }
    return {**one, **(other or {}), **{key: {**kept[key], **(other or {}).get(key, {})} for key in kept}}


def run_recipe(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None
) -> Result:
    """Compress, evaluate what was written, judge the expectations; the report holds them under `evaluation`.

    Of several processes the first one evaluates, and its result alone holds an evaluation.
    """
    return run_request(check_run(recipe), overwrite=overwrite, resume=resume, reporter=reporter)


def run_request(
    request: Request, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None
) -> Result:
    """`run_recipe` of a recipe that `check_run` has found nothing wrong with."""
    recipe, spec = request.recipe, request.recipe.evaluate
    result = compress_request(request, overwrite=overwrite, resume=resume, reporter=reporter)
    if spec is None or not processes().first:
        return result
    if spec.against == "dense":
        spec = spec.model_copy(update={"against": recipe.model})
    evaluation = evaluate(
        str(result.folder), spec, recipe.expect,
        device=recipe.device, trust_remote_code=recipe.trust_remote_code, reporter=reporter,
    )  # fmt: skip
    result.report["evaluation"] = evaluation
    write_json(result.folder / "report.json", result.report)
    write_card(result.folder, result.report, recipe)
    return result
