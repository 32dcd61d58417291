"""The way of a checkpoint, from a recipe to a finished folder: reads like the drawing in docs/architecture.md."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrcompress.bases import is_computed
from lrcompress.budget import bits_per_weight, removed
from lrcompress.checkpoint.folder import read_config_file
from lrcompress.errors import InputError, Interrupted
from lrcompress.evaluation.compare import check_chat_template, check_expectations, evaluate
from lrcompress.evaluation.gates import parse_expectation
from lrcompress.evaluation.tasks import parse_tasks
from lrcompress.foreign.opening import check_model, named_path, open_model, short_name
from lrcompress.model.device import fast_float32, memory_errors
from lrcompress.processes import join, processes, refuse_several
from lrcompress.recipe import Recipe
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import computing_versions, load_report, write_card
from lrcompress.stages.allocate import Plan, allocate, needs_artefacts, note_errors, summaries
from lrcompress.stages.backward import profile_backward, warn_unreached
from lrcompress.stages.block_types import find_block_types
from lrcompress.stages.calibrate import calibrate_model
from lrcompress.stages.finish import make_report
from lrcompress.stages.lengths import encode_all
from lrcompress.stages.needs import check_memory, needs
from lrcompress.stages.opened import Opened
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import Artefacts, profile
from lrcompress.stages.propagate import propagate
from lrcompress.stages.request import Request, check_request
from lrcompress.stages.search import reachable, search
from lrcompress.stages.sensitivity import measure_sensitivities
from lrcompress.stages.store import store
from lrcompress.stages.workspace import (
    Workspace,
    files_identity,
    model_identity,
    refuse_changed,
    texts_identity,
    write_json,
)


@dataclass
class Result:
    """A finished checkpoint and its report (the contents of report.json)."""

    folder: Path
    report: dict[str, Any]


def compress(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None
) -> Result:
    """Compress as the recipe says and write the checkpoint; the folder appears whole or not at all."""
    reporter = reporter or Reporter(quiet=True)
    output = output_folder(recipe)
    if output.suffix == ".gguf":
        raise InputError(
            f"output {output} is no folder's name: lrcompress compress -o writes GGUF files, name a folder"
        )
    request = check_request(recipe)
    join_processes(request, reporter)
    if resume and (finished := _finished(output, request)):
        Workspace(output, overwrite=overwrite, resume=resume).forget()
        reporter.say(f"{output} is finished already")
        return Result(output, finished)
    workspace = Workspace(output, overwrite=overwrite, resume=resume, inputs=files_read(request))
    with workspace, errors_in_words(request.device, f"run again with --resume to continue {workspace.partial}"):
        written = _finished(workspace.partial, request) if workspace.continued else None
        report = written or _compress(request, workspace, reporter)
        workspace.publish()
    return Result(output, report)


def join_processes(request: Request, reporter: Reporter) -> None:
    """Find the other processes of this run, if it has some; only the first one speaks."""
    team = join(request.device)
    samples = sum(samples for _, samples, _ in request.sources)
    if samples < team.size:
        raise InputError(f"{samples} calibration samples are too few for {team.size} processes: one each at least")
    if not team.first:
        reporter.silence()


@contextmanager
def errors_in_words(device: torch.device, resume: str) -> Iterator[None]:
    """Lack of memory, Ctrl-C and numbers that are not finite as errors of ours; `resume` says how to go on."""
    try:
        with memory_errors(f"out of memory on {device}: use fewer --samples or a shorter --seqlen; {resume}"):
            yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {resume}") from error
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise InputError(str(error)) from error


@fast_float32()
def _compress(request: Request, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    start, scratch = time.perf_counter(), workspace.scratch
    with reporter.timed("load"):
        opened = open_request(request, reporter)
    workspace.claim(identity(opened))
    needed = needs(opened)
    reporter.say(f"needs {needed}")
    if processes().first:
        workspace.check_room(needed.disk_bytes)
    processes().wait()  # until the first one has made room for all
    check_memory(opened, needed, reporter)
    check_judges(opened)
    find_block_types(opened, scratch, reporter)
    artefacts = profile_model(opened, scratch, reporter)
    more: dict[str, Any] = {"needs": needed.as_json(), "made_from": made_from(request)}
    if request.recipe.max_loss is not None:

        def write(candidate: Opened, folder: Path, own: Path, quiet: Reporter) -> dict[str, Any]:
            written = write_checkpoint(candidate, artefacts, folder, own, quiet, start)
            finish_checkpoint(candidate, written, folder)
            return written

        found = search(opened, scratch, reporter, write)
        more["search"] = found
        opened = replace(opened, request=replace(request, searched=found["ratio"]))
    report = write_checkpoint(opened, artefacts, workspace.partial, scratch, reporter, start, more)
    if request.recipe.refine is not None:
        refine_checkpoint(opened, report, workspace.partial, scratch, reporter, start)
    finish_checkpoint(opened, report, workspace.partial)
    return report


def check_judges(opened: Opened) -> None:
    """InputError, before the long work, where a search or a refinement would have nothing to go by."""
    recipe, calibration = opened.request.recipe, opened.calibration
    if recipe.max_loss is not None:
        reachable(opened)
    if calibration is None or not len(calibration.held_out):
        for asked, use in ((recipe.max_loss, "measure a loss on"), (recipe.refine, "judge a refinement by")):
            if asked is not None:
                raise InputError(f"the calibration text has no held-out window to {use}: use more text")


def refine_checkpoint(
    opened: Opened, report: dict[str, Any], folder: Path, scratch: Path, reporter: Reporter, start: float
) -> None:
    """Train what was written and say so in its report."""
    from lrcompress.training.refine import refine  # transformers' Trainer takes seconds to import

    with reporter.timed("refine"):
        report["refined"] = refine(opened, folder, scratch / "refine", reporter)
    report["warnings"] = list(reporter.warnings)
    report["seconds"] |= {"total": time.perf_counter() - start, "refine": reporter.seconds["refine"]}


def finish_checkpoint(opened: Opened, report: dict[str, Any], folder: Path) -> None:
    """The card, and the report last of all: where it is, nothing is left to do."""
    if processes().first:
        write_card(folder, report, opened.request.recipe)
        write_json(folder / "report.json", report)


def write_checkpoint(
    opened: Opened,
    artefacts: Artefacts | None,
    folder: Path,
    scratch: Path,
    reporter: Reporter,
    start: float,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Allocate, decompose again where propagation is sequential, and store; `start` is when the work began.

    `more` goes into the report: what was needed, and what a search for the ratio found.
    """
    plan = processes().gather(allocate(opened, artefacts))[0]  # another machine may have rounded otherwise
    if opened.request.sequential:
        artefacts = propagate(opened, plan, artefacts, scratch, reporter)
        processes().wait()
        note_errors(plan, summaries(opened, artefacts))
    assert artefacts is not None
    if opened.request.method.sizes_are_estimates and not opened.request.sequential:
        artefacts = encode_all(opened, plan, artefacts, scratch, reporter)
    if processes().first:
        write_json(folder / "plan.json", plan_json(opened, plan))
    with reporter.timed("write"):
        store(opened, plan, artefacts, folder, scratch, reporter)
    processes().wait()
    report = make_report(opened, plan, folder, reporter)
    report["seconds"] = {"total": time.perf_counter() - start, **report["seconds"]}
    return report | (more or {})


def check_run(recipe: Recipe) -> None:
    """InputError for what can be seen to be wrong with a recipe before its model is loaded or anything is written."""
    expectations = [parse_expectation(text) for text in recipe.expect]
    spec = recipe.evaluate
    check_request(recipe)
    if spec is None:
        if expectations:
            raise InputError("the recipe expects something but evaluates nothing: add evaluate: {tasks: [...]}")
        return
    tasks = parse_tasks(spec.tasks)
    other = recipe.model if spec.against in (None, "dense") else spec.against
    if other != recipe.model:
        read_config_file(open_model(other).folder)
    check_chat_template(spec, [recipe.model, other], trust_remote_code=recipe.trust_remote_code)
    check_expectations(expectations, tasks, ("bytes", "stored_ratio", "bpw"), compared=spec.against is not None)


def run_recipe(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None
) -> Result:
    """Compress, evaluate what was written, judge the expectations; the report holds them under `evaluation`.

    Of several processes the first one evaluates, and its result alone holds an evaluation.
    """
    check_run(recipe)
    return run_checked(recipe, overwrite=overwrite, resume=resume, reporter=reporter)


def run_checked(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None
) -> Result:
    """`run_recipe` of a recipe that `check_run` has found nothing wrong with."""
    spec = recipe.evaluate
    result = compress(recipe, overwrite=overwrite, resume=resume, reporter=reporter)
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


@fast_float32()
def make_plan(recipe: Recipe, *, reporter: Reporter | None = None) -> dict[str, Any]:
    """What would be stored where, without writing a checkpoint; decomposes only where the allocator needs it."""
    refuse_several("a plan")
    reporter = reporter or Reporter(quiet=True)
    if recipe.max_loss is not None:
        raise InputError(
            f"max_loss {recipe.max_loss:g} is found by measuring checkpoints, which a plan does not write: "
            "plan with a ratio or a size, or compress"
        )
    request = check_request(recipe)
    in_words = errors_in_words(request.device, "a plan leaves nothing behind, run it again")
    with tempfile.TemporaryDirectory(prefix="lrcompress-plan-") as folder, in_words:
        scratch = Path(folder)
        opened = open_request(request, reporter, calibrate=False)
        find_block_types(opened, scratch, reporter)
        needed, artefacts = needs(opened), None
        check_memory(opened, needed, reporter)
        if needs_artefacts(opened):
            calibrate_model(opened, reporter)
            artefacts = profile_model(opened, scratch, reporter)
        plan = allocate(opened, artefacts)
        return {**plan_json(opened, plan), "needs": needed.as_json()}


def profile_model(opened: Opened, scratch: Path, reporter: Reporter) -> Artefacts | None:
    """Statistics and decompositions on the dense model's inputs; None where nothing that follows needs them."""
    request = opened.request
    if request.sequential and not request.method.needs_gradients and not needs_artefacts(opened):
        if not opened.embeddings:  # they are rounded before any block, by what the dense model's pass says
            return None
    walk = profile_backward if request.method.needs_gradients else profile
    artefacts = walk(opened, scratch, reporter)
    if request.allocator.needs_sensitivity and request.recipe.rank is None:
        measure_sensitivities(opened, artefacts, reporter)
    processes().wait()
    if request.method.needs_gradients:
        warn_unreached(opened, artefacts, reporter)
    return artefacts


def output_folder(recipe: Recipe) -> Path:
    """Where the recipe's checkpoint goes."""
    base = [] if recipe.base is None else [_base_name(recipe.base)]
    name = "-".join([short_name(recipe.model), recipe.method.name, *base, _amount_name(recipe)])
    return named_path(recipe.output or name, "output")


def _amount_name(recipe: Recipe) -> str:
    """The part of how much was asked for that names an output folder."""
    if recipe.size is not None:
        return recipe.size.replace(" ", "")
    if recipe.bpw is not None:
        return f"{recipe.bpw:g}bpw"
    if recipe.max_loss is not None:
        return f"loss-{100 * recipe.max_loss:g}%"
    if recipe.type is not None:
        return recipe.type
    if recipe.ratio is None:
        return f"r{recipe.rank}"
    return f"{recipe.ratio:g}" + ("" if recipe.ratio_of == "bytes" else f"-{recipe.ratio_of}")


def _base_name(base: str) -> str:
    """The part of --base that names an output folder."""
    if is_computed(base):
        return base.replace(":", "-").replace("/", "-")
    return short_name(str(Path(base).expanduser().resolve()))


def plan_json(opened: Opened, plan: Plan) -> dict[str, Any]:
    """plan.json: the decision as an artefact."""
    dense, stored = sum(plan.dense_bytes.values()), sum(plan.bytes.values())
    whole = opened.dense_checkpoint_bytes
    return {
        "schema": 1,
        "model": opened.request.recipe.model,
        "method": opened.request.method.name,
        "metric": opened.request.method.metric,
        "allocator": opened.request.amount_by,
        "base": opened.request.method.base,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "ratio": {"asked": opened.request.recipe.ratio, "of": opened.request.recipe.ratio_of, "counted": plan.removed,
                  "planned": removed(stored, dense), "whole_model": (dense - stored) / whole,
                  "bpw": bits_per_weight(stored, sum(site.shape[0] * site.shape[1] for site in opened.sites))},
        "asked": opened.request.recipe.model_dump(
            mode="json", include={"ratio", "bpw", "size", "rank", "max_loss", "type"}
        ),
        "bytes": {"targets_dense": dense, "targets_stored": stored, "checkpoint": whole - dense + stored},
        "targets": plan.entries(opened.sites),
        **({"joined": plan.joined()} if plan.joins else {}),
    }  # fmt: skip


def identity(opened: Opened) -> dict[str, Any]:
    """What resumed work must agree with: recipe, files, text, number of processes, versions."""
    return {
        "recipe": opened.request.recipe.identity(),
        **made_from(opened.request),
        "calibration text": opened.calibration.digest() if opened.calibration is not None else None,
        "number of processes": processes().size,
        "kind of device": [opened.request.device.type, str(opened.walker.dtype)],
        "versions": computing_versions(),
    }


def made_from(request: Request) -> dict[str, Any]:
    """The files that a recipe names, so far as they can be told apart without opening them: a finished run's too."""
    base = request.method.existing_base
    return {
        "model files": model_identity(request.recipe.model),
        "base files": None if base is None else files_identity(base.folder),
        "calibration files": texts_identity(source for source, _, _ in request.sources),
    }


def files_read(request: Request) -> list[Path]:
    """The files and folders on this machine that a run reads, its evaluation included."""
    recipe, base = request.recipe, request.method.existing_base
    models, found = [recipe.model], [source.path for source, _, _ in request.sources]
    if recipe.evaluate is not None:
        models += [] if recipe.evaluate.against in (None, "dense") else [recipe.evaluate.against]
        for task in parse_tasks(recipe.evaluate.tasks):
            found += [*task.files, None if task.source is None else task.source.path]
    found += [check_model(model) for model in models] + ([] if base is None else [base.folder])
    return [path for path in found if path is not None]


def _finished(folder: Path, request: Request) -> dict[str, Any] | None:
    """The report of a finished run that this one would repeat; InputError where the folder holds another one.

    Where it lies and what is measured on it may differ.
    """
    report = load_report(folder)
    if report is None:
        return None
    before, now = report["recipe"], request.recipe.model_dump(mode="json")
    changed = sorted(key for key in request.recipe.identity() if before.get(key) != now[key])
    if changed:
        raise InputError(
            f"{folder} holds a finished run of another recipe ({', '.join(changed)} differ): choose another -o, or "
            "pass --overwrite without --resume"
        )
    refuse_changed(folder, report.get("made_from"), made_from(request))
    return {**report, "recipe": now}
