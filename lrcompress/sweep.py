"""Methods x ratios x seeds on one model: the common part once, then every point is written, loaded and measured."""

import csv
import io
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrcompress.errors import InputError
from lrcompress.evaluation.compare import evaluate
from lrcompress.evaluation.tasks import parse_tasks
from lrcompress.model.device import resolve_device
from lrcompress.pipeline import errors_in_words, finish_checkpoint, identity, profile_model, write_checkpoint
from lrcompress.processes import refuse_several
from lrcompress.recipe import Sweep, SweepMethod
from lrcompress.report.pareto import draw
from lrcompress.report.progress import Reporter
from lrcompress.stages.prepare import Opened, check_request, open_request
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.search import branch
from lrcompress.stages.workspace import write_json

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
        return f"{self.method.label}-{self.ratio:g}-seed{self.seed}".replace("/", "-")


def sweep(recipe: Sweep, *, overwrite: bool = False, reporter: Reporter | None = None) -> dict[str, Any]:
    """Measure every point; points that the output folder has already are not measured again.

    Writes points/NAME.json as they come, then sweep.csv and one picture per perplexity. Returns {"dense": results,
    "points": [...]}. InputError, before anything runs, where the folder holds another sweep.
    """
    refuse_several("a sweep")
    reporter = reporter or Reporter(quiet=True)
    folder = Path(recipe.output).expanduser()
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"output {folder} cannot be made: {existing} is a file, name a folder")
    points = [Point(m, r, s) for s in recipe.seeds for m in recipe.methods for r in sorted(recipe.ratios)]
    for point in points:
        check_request(recipe.recipe(point.method, point.ratio, point.seed))
    parse_tasks(recipe.evaluate.tasks)
    _claim(folder, recipe, overwrite)
    with errors_in_words(resolve_device(recipe.device), f"run the same sweep again to continue in {folder}"):
        dense = _dense(recipe, folder, reporter)
        for seed in recipe.seeds:
            for method in recipe.methods:
                left = [p for p in points if (p.method, p.seed) == (method, seed) and not _file(folder, p).exists()]
                if left:
                    _measure(recipe, left, folder, reporter)
    rows = [json.loads(_file(folder, point).read_text()) for point in points]
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    result = {"schema": 1, "model": recipe.model, "dense": dense, "points": rows}
    write_json(folder / "results.json", result)
    (folder / "sweep.csv").write_text(as_csv(result), encoding="utf8")
    draw(result, folder)
    return result


def as_csv(result: dict[str, Any]) -> str:
    """A row per point, a column per metric; the dense model first."""
    metrics = [(task, key) for task, values in result["dense"]["results"].items() for key in values]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["method", "ratio", "seed", "stored_ratio", "bytes", "seconds", *map(":".join, metrics)])
    for row in [result["dense"], *result["points"]]:
        values = [row["results"].get(task, {}).get(key, "") for task, key in metrics]
        head = [row.get(key, "") for key in ("method", "ratio", "seed", "stored_ratio", "bytes", "seconds")]
        writer.writerow([*head, *values])
    return out.getvalue()


def _claim(folder: Path, recipe: Sweep, overwrite: bool) -> None:
    path, mine = folder / IDENTITY, json.loads(recipe.model_dump_json(exclude={"output", "keep"}))
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if path.exists():
        before = json.loads(path.read_text())
        # More methods, ratios and seeds may join a sweep; what its points have in common may not change.
        changed = [key for key in mine if key not in ("methods", "ratios", "seeds") and before.get(key) != mine[key]]
        if changed:
            raise InputError(
                f"{folder} has another sweep ({', '.join(changed)} differ): choose another output or pass --overwrite"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"output folder {folder} is not empty: choose another, or pass --overwrite")
    (folder / "points").mkdir(parents=True, exist_ok=True)
    write_json(path, mine)


def _file(folder: Path, point: Point) -> Path:
    return folder / "points" / f"{point.name}.json"


def _dense(recipe: Sweep, folder: Path, reporter: Reporter) -> dict[str, Any]:
    path = folder / "dense.json"
    if not path.exists():
        reporter.say(f"measuring {recipe.model}, dense")
        found = _evaluate(recipe, recipe.model, reporter)
        write_json(path, {"method": "dense", "bytes": found["facts"]["bytes"], "results": found["results"]})
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _evaluate(recipe: Sweep, model: str, reporter: Reporter) -> dict[str, Any]:
    spec = recipe.evaluate.model_copy(update={"against": None})
    return evaluate(
        model, spec, device=recipe.device, trust_remote_code=recipe.trust_remote_code, reporter=reporter
    )  # fmt: skip


def _measure(recipe: Sweep, points: list[Point], folder: Path, reporter: Reporter) -> None:
    """Points of one method and seed: the dense model is walked once for all of them."""
    label = f"{points[0].method.label}-seed{points[0].seed}".replace("/", "-")
    scratch = folder / "scratch" / label
    scratch.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    first = recipe.recipe(points[0].method, points[0].ratio, points[0].seed)
    opened = open_request(check_request(first), reporter)
    _check_scratch(scratch, opened)
    artefacts = profile_model(opened, scratch, reporter)
    shared = time.perf_counter() - start
    for point in points:
        reporter.say(f"{point.method.label} at {point.ratio:g}, seed {point.seed}")
        request = check_request(recipe.recipe(point.method, point.ratio, point.seed))
        row = _point(recipe, point, replace(opened, request=request), artefacts, folder, scratch, reporter)
        write_json(_file(folder, point), {**row, "shared_seconds": shared})
    shutil.rmtree(scratch)


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
    found = _evaluate(recipe, str(checkpoint), quiet)
    if not recipe.keep:
        shutil.rmtree(checkpoint)
    for text, values in found["results"].items():
        reporter.say(f"  {text}: " + ", ".join(f"{k} {v:.5g}" for k, v in values.items() if isinstance(v, float)))
    return {
        "method": point.method.label,
        "ratio": point.ratio,
        "seed": point.seed,
        "stored_ratio": report["ratio"]["stored"],
        "bytes": report["bytes"]["checkpoint"],
        "seconds": seconds,
        "warnings": report["warnings"],
        "results": found["results"],
    }
