"""What a run is made from: by it unfinished work is resumed, and a finished run known again."""

from pathlib import Path
from typing import Any

from lrcompress.calibration.drawing import images_drawn, windows_for
from lrcompress.errors import InputError
from lrcompress.evaluation.tasks import parse_tasks
from lrcompress.foreign.opening import check_model
from lrcompress.parallel.processes import processes
from lrcompress.precision import wide
from lrcompress.report.summary import computing_versions, load_report
from lrcompress.stages.opened import Opened
from lrcompress.stages.request import Request
from lrcompress.stages.workspace import files_identity, model_identity, refuse_changed, texts_identity

IMAGES = "calibration images"
"""Under which their digests are kept, where there are any."""


def identity(opened: Opened) -> dict[str, Any]:
    """What resumed work must agree with: recipe, files, text, number of processes, versions."""
    return {
        "recipe": opened.request.recipe.identity(),
        **made_from(opened),
        "calibration text": opened.calibration.digest() if opened.calibration is not None else None,
        "number of processes": processes().size,
        "kind of device": [opened.request.device.type, str(opened.walker.dtype), str(wide(opened.walker.device))],
        "versions": computing_versions(),
    }


def made_from(opened: Opened) -> dict[str, Any]:
    """The files that a recipe names, so far as they can be told apart without opening them: a finished run's too."""
    return _made_from(opened.request, {} if opened.calibration is None else opened.calibration.pictures)


def _made_from(request: Request, images: dict[str, str]) -> dict[str, Any]:
    """The same, from the digests of the images that sources name."""
    base = request.method.existing_base
    return {
        "model files": model_identity(request.recipe.model),
        "base files": None if base is None else files_identity(base.folder),
        "calibration files": texts_identity(source for source, _, _ in request.sources),
        **({IMAGES: images} if images else {}),
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


def finished(folder: Path, request: Request) -> dict[str, Any] | None:
    """The report of a finished run that this one would repeat; InputError where the folder holds another one.

    Where it lies and what is measured on it may differ.
    """
    report = load_report(folder)
    if report is None:
        return None
    recipe = request.recipe
    before, now = report["recipe"], recipe.model_dump(mode="json")
    changed = sorted(key for key in recipe.identity() if before.get(key) != now[key])
    if changed:
        raise InputError(
            f"{folder} holds a finished run of another recipe ({', '.join(changed)} differ): choose another -o, or "
            "pass --overwrite without --resume"
        )
    made, images = report.get("made_from"), dict[str, str]()
    if isinstance(made, dict) and IMAGES in made:  # otherwise the same files have none now either
        for source, samples, _ in request.drawn:
            if digest := images_drawn(source, samples, request.windows or windows_for(samples), recipe.seed):
                images[source.name] = digest
    refuse_changed(folder, made, _made_from(request, images))
    return {**report, "recipe": now}
