"""Methods x ratios x seeds on one model: the common part once, then every point is written, loaded and measured."""

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrcompress.calibration.corpus import parse_source
from lrcompress.checkpoint.cache import content_digest, files_digest, statistics_kept_in
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.evaluation.compare import evaluate
from lrcompress.evaluation.harness import measurable
from lrcompress.evaluation.tasks import Task, parse_tasks
from lrcompress.foreign.opening import check_model, open_model
from lrcompress.model.device import fast_float32, resolve_device, resolve_dtype
from lrcompress.parallel.processes import refuse_several
from lrcompress.pipeline import finish_checkpoint, profile_model, write_checkpoint
from lrcompress.recipe import Sweep, SweepMethod
from lrcompress.report.pareto import draw
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import bits_stored, versions
from lrcompress.report.table import as_csv
from lrcompress.stages.amount import check_amount
from lrcompress.stages.calibrate import calibrate_model
from lrcompress.stages.identity import identity
from lrcompress.stages.in_words import errors_in_words
from lrcompress.stages.opened import Opened
from lrcompress.stages.opening import open_parts
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.request import Request, check_request
from lrcompress.stages.search import branch
from lrcompress.stages.workspace import held_input, write_json

IDENTITY = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One checkpoint of a sweep."""

    method: SweepMethod
    ratio: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method.label}-{self.ratio!r}-seed{self.seed}".replace("/", "-")


def sweep(recipe: Sweep, *, overwrite: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Measure every point; points that the output folder has already are not measured again.

    Writes points/NAME.json as they come, then sweep.csv and one picture per perplexity. Returns {"dense": results,
    "points": [...]}. A point that cannot be reached, or whose model cannot be measured, has an `error` in place of
    results. InputError, before anything runs, where the folder holds another sweep; and where no point has results.
    """
    refuse_several("a sweep")
    reporter = reporter or Reporter(quiet=True)
    folder = Path(recipe.output).expanduser()
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"output {folder} cannot be made: {existing} is a file, name a folder")
    points = [Point(m, r, s) for s in recipe.seeds for m in recipe.methods for r in sorted(recipe.ratios)]
    _check_names(points)
    asked = [(point, check_request(recipe.recipe(point.method, point.ratio, point.seed))) for point in points]
    tasks = parse_tasks(recipe.evaluate.tasks)
    measurable(tasks, compared=recipe.evaluate.against is not None)
    _claim(folder, recipe, _inputs(recipe, [request for _, request in asked], tasks), overwrite)
    in_words = errors_in_words(resolve_device(recipe.device), f"run the same sweep again to continue in {folder}")
    with in_words, statistics_kept_in(folder / "scratch" / "statistics"):
        dense = _dense(recipe, folder, reporter)
        for seed in recipe.seeds:
            for method in recipe.methods:
                own = [(p, request) for p, request in asked if (p.method, p.seed) == (method, seed)]
                left = [(p, request) for p, request in own if not _file(folder, p).exists()]
                if left:
                    _measure(recipe, left, folder, reporter)
    rows = [json.loads(_file(folder, point).read_text()) for point in points]
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    if all("error" in row for row in rows):
        raise InputError(f"no point of the sweep has results: {rows[0]['error']}")
    result = {"schema": 1, "model": recipe.model, "dense": dense, "points": rows}
    write_json(folder / "results.json", result)
    (folder / "sweep.csv").write_text(as_csv(result), encoding="utf8")
    draw(result, folder)
    return result


def _check_names(points: list[Point]) -> None:
    names = [point.name for point in points]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"the sweep has two points {twice}: leave one out")


def _inputs(recipe: Sweep, requests: list[Request], tasks: list[Task]) -> dict[str, Path]:
    """What the points are made from and measured with: files and models' folders, by what the recipe calls them."""
    models = {recipe.model, recipe.evaluate.against or "dense"} - {"dense"}
    found = {model: open_model(model).folder for model in sorted(models)}
    for request in requests:
        if request.method.existing_base is not None:
            found[request.method.existing_base.text] = request.method.existing_base.folder
    sources = [parse_source(spec.source) for spec in recipe.calibration] + [t.source for t in tasks if t.source]
    paths = [source.path for source in sources] + [path for task in tasks for path in task.files]
    return {**found, **{str(path): path for path in paths if path is not None}}


def _digest(path: Path) -> str:
    if (path / "config.json").is_file():
        return content_digest(path)
    return files_digest(part for part in (sorted(path.rglob("*")) if path.is_dir() else [path]) if part.is_file())


def _claim(folder: Path, recipe: Sweep, inputs: dict[str, Path], overwrite: bool) -> None:
    """Make the folder this sweep's own; InputError where it is another's, and nothing is touched then."""
    path, mine = folder / IDENTITY, json.loads(recipe.model_dump_json(exclude={"output", "keep"}))
    files = {name: _digest(place) for name, place in inputs.items()}
    if overwrite:
        _remove(folder, [*inputs.values(), *(place for place in map(_local, inputs) if place is not None)])
    if path.exists():
        before = json.loads(path.read_text())
        # More methods, ratios and seeds may join a sweep; what its points have in common may not change.
        changed = [key for key in mine if key not in ("methods", "ratios", "seeds") and before.get(key) != mine[key]]
        known = before.get("files", {})
        changed += [name for name in files if known.get(name, files[name]) != files[name]]
        changed += ["versions"] if before.get("versions", versions()) != versions() else []
        if changed:
            raise InputError(
                f"{folder} has another sweep ({', '.join(changed)} differ): choose another output or pass --overwrite"
            )
        files = {**known, **files}
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"output folder {folder} is not empty: choose another, or pass --overwrite")
    (folder / "points").mkdir(parents=True, exist_ok=True)
    write_json(path, {**mine, "files": files, "versions": versions()})


def _local(name: str) -> Path | None:
    """The place of a model as its user knows it, which for a GGUF file is not that of its folder."""
    try:
        return check_model(name)
    except InputError:  # it is no model but a text
        return None


def _remove(folder: Path, inputs: list[Path]) -> None:
    """Remove a sweep's folder; InputError where it is none, or holds what is to be read."""
    held = held_input(folder, inputs)
    if held is not None:
        raise InputError(f"output {folder} holds {held}, which is read: choose another output")
    if folder.exists():
        if any(folder.iterdir()) and not (folder / IDENTITY).exists():
            raise InputError(f"output folder {folder} is no sweep's, --overwrite leaves it alone: choose another")
        shutil.rmtree(folder)


def _file(folder: Path, point: Point) -> Path:
    return folder / "points" / f"{point.name}.json"


def _dense(recipe: Sweep, folder: Path, reporter: Reporter) -> dict[str, Any]:
    path = folder / "dense.json"
    if not path.exists():
        reporter.say(f"measuring {recipe.model}, dense")
        found = _evaluate(recipe, recipe.model, None, reporter)
        write_json(path, {"method": "dense", "bytes": _dense_bytes(recipe), "results": found["results"]})
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _dense_bytes(recipe: Sweep) -> float:
    """Of the dense checkpoint as the points are written: in their dtype."""
    model = open_model(recipe.model)
    reader = CheckpointReader(model.folder)
    if recipe.dtype == "auto" and not model.from_gguf:
        return float(reader.bytes)
    dtype = resolve_dtype(recipe.dtype, torch.bfloat16)
    return float(reader.bytes // reader.dtype.itemsize * dtype.itemsize)


def _evaluate(recipe: Sweep, model: str, against: str | None, reporter: Reporter) -> dict[str, Any]:
    spec = recipe.evaluate.model_copy(update={"against": against})
    return evaluate(
        model, spec, device=recipe.device, trust_remote_code=recipe.trust_remote_code, reporter=reporter
    )  # fmt: skip


@fast_float32()
def _measure(recipe: Sweep, asked: list[tuple[Point, Request]], folder: Path, reporter: Reporter) -> None:
    """Points of one method and seed: the dense model is walked once for all of them."""
    first, request = asked[0]
    label = f"{first.method.label}-seed{first.seed}".replace("/", "-")
    scratch = folder / "scratch" / label
    scratch.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    opened = open_parts(request, reporter)
    possible = []
    for point, request in asked:
        try:
            check_amount(replace(opened, request=request), reporter)
            possible.append((point, request))
        except InputError as error:
            _note_error(folder, point, error, reporter)
    if possible:
        opened = replace(opened, request=possible[0][1])
        calibrate_model(opened, reporter)
        _check_scratch(scratch, opened)
        artefacts = profile_model(opened, scratch, reporter)
        shared = time.perf_counter() - start
    for point, request in possible:
        reporter.say(f"{point.method.label} at {point.ratio:g}, seed {point.seed}")
        try:
            with errors_in_words(request.device, f"run the same sweep again to continue in {folder}"):
                row = _point(recipe, point, replace(opened, request=request), artefacts, folder, scratch, reporter)
            write_json(_file(folder, point), {**row, "shared_seconds": shared})
        except InputError as error:
            _note_error(folder, point, error, reporter)
    shutil.rmtree(scratch)


def _note_error(folder: Path, point: Point, error: InputError, reporter: Reporter) -> None:
    """A point without results: the others of the sweep are measured all the same."""
    for left in (folder / f"{point.name}.partial", folder / point.name):
        shutil.rmtree(left, ignore_errors=True)
    reporter.warn(f"{point.method.label} at {point.ratio:g}, seed {point.seed}: {error}")
    row = {"method": point.method.label, "ratio": point.ratio, "seed": point.seed, "error": str(error), "results": {}}
    write_json(_file(folder, point), row)


def _check_scratch(scratch: Path, opened: Opened) -> None:
    """Start afresh where the decompositions were made from other files."""
    mine = {key: value for key, value in identity(opened).items() if key != "recipe"}
    path = scratch / "identity.json"
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(mine)):
        shutil.rmtree(scratch)
        scratch.mkdir()
    write_json(path, mine)


def _point(
    recipe: Sweep,
    point: Point,
    opened: Opened,
    artefacts: Artefacts | None,
    folder: Path,
    scratch: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    start, own, partial = time.perf_counter(), scratch / point.name, folder / f"{point.name}.partial"
    branch(opened, scratch, own)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    quiet = Reporter(quiet=True)
    report = write_checkpoint(opened, artefacts, partial, own, quiet, start)
    finish_checkpoint(opened, report, partial)
    shutil.rmtree(own)
    checkpoint = folder / point.name
    shutil.rmtree(checkpoint, ignore_errors=True)
    partial.rename(checkpoint)
    seconds = time.perf_counter() - start
    against = recipe.model if recipe.evaluate.against == "dense" else recipe.evaluate.against
    found = _evaluate(recipe, str(checkpoint), against, quiet)
    if not recipe.keep:
        shutil.rmtree(checkpoint)
    for text, values in found["results"].items():
        reporter.say(f"  {text}: " + ", ".join(f"{k} {v:.5g}" for k, v in values.items() if isinstance(v, float)))
    return {
        "method": point.method.label,
        "ratio": point.ratio,
        "seed": point.seed,
        "stored_ratio": report["ratio"]["stored"],
        "bpw": bits_stored(report),
        "bytes": report["bytes"]["checkpoint"],
        "seconds": seconds,
        "warnings": report["warnings"],
        "results": found["results"],
        **({} if found["against"] is None else {"tests": found["against"]["tests"]}),
    }
