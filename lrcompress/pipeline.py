"""The way of a checkpoint, from a recipe to a finished folder: reads like the drawing in docs/architecture.md."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrcompress.budget import bits_per_weight, removed
from lrcompress.errors import InputError
from lrcompress.model.device import fast_float32
from lrcompress.parallel.processes import check_samples, join, processes, refuse_several
from lrcompress.recipe import Recipe
from lrcompress.report.card import write_card
from lrcompress.report.progress import Reporter, duration
from lrcompress.report.summary import caution
from lrcompress.stages.allocate import Plan, allocate, needs_artefacts, needs_profile, note_errors, summaries
from lrcompress.stages.backward import profile_backward, warn_unreached
from lrcompress.stages.block_types import find_block_types
from lrcompress.stages.calibrate import calibrate_model
from lrcompress.stages.finish import make_report
from lrcompress.stages.identity import files_read, finished, identity, made_from
from lrcompress.stages.in_words import errors_in_words
from lrcompress.stages.lengths import encode_all
from lrcompress.stages.naming import output_folder
from lrcompress.stages.needs import check_memory, needs
from lrcompress.stages.opened import Opened
from lrcompress.stages.opening import open_request
from lrcompress.stages.phases import PROFILE
from lrcompress.stages.profile import Artefacts, profile
from lrcompress.stages.propagate import propagate
from lrcompress.stages.rate_curve import predicted_loss, rate_curve, unit_of
from lrcompress.stages.request import Request, check_request
from lrcompress.stages.search import as_held_out, reachable, search
from lrcompress.stages.sensitivity import measure_sensitivities
from lrcompress.stages.store import store
from lrcompress.stages.time_need import phase_seconds
from lrcompress.stages.traffic import exchanged
from lrcompress.stages.workspace import (
    Workspace,
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
    return compress_request(check_request(recipe), overwrite=overwrite, resume=resume, reporter=reporter)


def compress_request(
    request: Request, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None
) -> Result:
    """`compress` of a recipe whose names have been looked up."""
    reporter = reporter or Reporter(quiet=True)
    output = output_folder(request.recipe)
    if output.suffix == ".gguf":
        raise InputError(
            f"output {output} is no folder's name: lrcompress compress -o writes GGUF files, name a folder"
        )
    join_processes(request, reporter)
    if resume and (before := finished(output, request)):
        Workspace(output, overwrite=overwrite, resume=resume).forget()
        reporter.say(f"{output} is finished already")
        return Result(output, before)
    workspace = Workspace(output, overwrite=overwrite, resume=resume, inputs=files_read(request))
    with workspace, errors_in_words(request.device, f"run again with --resume to continue {workspace.partial}"):
        written = finished(workspace.partial, request) if workspace.continued else None
        report = written or _compress(request, workspace, reporter)
        workspace.publish()
    return Result(output, report)


def join_processes(request: Request, reporter: Reporter) -> None:
    """Find the other processes of this run, if it has some; only the first one speaks."""
    team = join(request.device)
    samples = sum(samples for _, samples, _ in request.sources)
    check_samples(samples, team.size)
    if not team.first:
        reporter.silence()


@fast_float32()
def _compress(request: Request, workspace: Workspace, reporter: Reporter) -> dict[str, Any]:
    start, scratch = time.perf_counter(), workspace.scratch
    with reporter.timed("load"):
        opened = open_request(request, reporter)
    workspace.claim(identity(opened))
    needed = needs(opened)
    reporter.say(f"needs {needed}")
    reporter.expect(phase_seconds(opened, processes().size))
    if processes().first:
        workspace.check_room(needed.disk_bytes)
    processes().wait()  # until the first one has made room for all
    check_memory(opened, needed, reporter)
    check_judges(opened)
    if said := caution(request.method.metric, request.method.base, general=True):
        reporter.say(said)
    find_block_types(opened, scratch, reporter)
    artefacts = profile_model(opened, scratch, reporter)
    more: dict[str, Any] = {"needs": needed.as_json(), "made_from": made_from(opened)}
    if artefacts is not None and request.method.sizes_are_estimates:
        more["rates"] = rate_curve(opened, artefacts)
    if request.recipe.max_loss is not None:

        def write(candidate: Opened, folder: Path, own: Path, quiet: Reporter) -> dict[str, Any]:
            written = write_checkpoint(candidate, artefacts, folder, own, quiet, start)
            finish_checkpoint(candidate, written, folder)
            return written

        found = search(opened, artefacts, scratch, reporter, write)
        more |= {"search": found, "held_out": as_held_out(found, max(length for _, _, length in request.sources))}
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
    if calibration is None or not calibration.unseen:
        for asked, use in ((recipe.max_loss, "measure a loss on"), (recipe.refine, "judge a refinement by")):
            if asked is not None:
                raise InputError(f"the calibration text has no held-out window to {use}: use more text")
    if opened.unread and recipe.max_loss is not None:
        raise InputError(
            f"--max-loss is measured on text, which does not reach {opened.unread[0]}: ask for a --ratio or --bpw, or "
            "leave it out with --ignore"
        )
    if calibration is not None and any(sample.look is not None for sample in calibration.samples + calibration.unseen):
        for asked, option in ((recipe.max_loss, "--max-loss"), (recipe.refine, "--refine")):
            if asked is not None:
                raise InputError(f"{option} reads text alone, the calibration data has images: leave it out, or them")


def refine_checkpoint(
    opened: Opened, report: dict[str, Any], folder: Path, scratch: Path, reporter: Reporter, start: float
) -> None:
    """Train what was written and say so in its report."""
    from lrcompress.training.refine import refine  # transformers' Trainer takes seconds to import

    with reporter.timed("refine"):
        report["refined"] = refine(opened, folder, scratch / "refine", reporter)
    if report["refined"]["kept"]:
        report.pop("held_out", None)  # that of the weights before
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
        held_out = store(opened, plan, artefacts, folder, scratch, reporter)
    processes().wait()
    report = make_report(opened, plan, folder, reporter)
    report["seconds"] = {"total": time.perf_counter() - start, **report["seconds"]}
    if processes().size > 1:
        report["processes"] = {"count": processes().size, "traffic_bytes": processes().traffic}
    return report | ({} if held_out is None else {"held_out": held_out}) | (more or {})


@fast_float32()
def make_plan(recipe: Recipe, *, nodes: int = 1, devices: int = 1, reporter: Reporter | None = None) -> dict[str, Any]:
    """What would be stored where, without writing a checkpoint; decomposes only where the allocator needs it.

    The needs are those of one of nodes × devices processes, as torchrun would start them; several need a look at which
    layers read the same input, and so the text.
    """
    refuse_several("a plan")
    for what, number in (("nodes", nodes), ("devices", devices)):
        if number < 1:
            raise InputError(f"--{what} {number} is no number of {what}: 1 or more")
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
        together = nodes * devices
        opened = open_request(request, reporter, calibrate=together > 1)
        find_block_types(opened, scratch, reporter)
        check_samples(sum(samples for _, samples, _ in request.sources), together)
        needed, artefacts = needs(opened, nodes, devices), None
        reporter.say(f"compressing needs {needed}")
        check_memory(opened, needed, reporter)
        if needs_artefacts(opened):
            known = {title: took for title, took in phase_seconds(opened).items() if title in PROFILE}
            reporter.say(f"the plan depends on the text: reading it takes roughly {duration(sum(known.values()))}")
            reporter.expect(known)
            if together == 1:
                calibrate_model(opened, reporter)
            artefacts = profile_model(opened, scratch, reporter)
        plan = allocate(opened, artefacts)
        if together > 1:
            sent = exchanged(opened, plan, together)
            needed = replace(needed, traffic_bytes=needed.traffic_bytes + sent)
        found = {**plan_json(opened, plan), "needs": needed.as_json()}
        if artefacts is not None and request.method.needs_gradients and not plan.joins:
            found["predicted"] = {"unit": unit_of(opened), "loss": predicted_loss(opened, plan, artefacts)}
        return found


def profile_model(opened: Opened, scratch: Path, reporter: Reporter) -> Artefacts | None:
    """Statistics and decompositions on the dense model's inputs; None where nothing that follows needs them."""
    request = opened.request
    if not needs_profile(opened):
        return None
    walk = profile_backward if request.method.needs_gradients else profile
    artefacts = walk(opened, scratch, reporter)
    if request.allocator.needs_sensitivity and request.recipe.rank is None:
        measure_sensitivities(opened, artefacts, reporter)
    processes().wait()
    if request.method.needs_gradients:
        warn_unreached(opened, artefacts, reporter)
    return artefacts


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
        "left_dense": opened.left_dense(),
        **({"joined": plan.joined()} if plan.joins else {}),
    }  # fmt: skip
