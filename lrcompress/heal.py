"""Healing: a compressed checkpoint is trained on in its compressed form, and written as another one like it."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lrcompress.calibration.corpus import Source, narrow_text, split_source
from lrcompress.checkpoint.beside import files_in_folders
from lrcompress.checkpoint.folder import load_tokenizer
from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.checkpoint.writer import copy_files, disk_errors
from lrcompress.errors import InputError
from lrcompress.foreign.opening import check_model, open_model, short_name
from lrcompress.model.device import resolve_device
from lrcompress.parallel.processes import join
from lrcompress.pipeline import Result
from lrcompress.recipe import make_recipe
from lrcompress.report.card import write_card
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import load_report, read_report, versions
from lrcompress.stages.in_words import errors_in_words
from lrcompress.stages.workspace import (
    Workspace,
    files_identity,
    model_identity,
    refuse_changed,
    texts_identity,
    write_json,
)
from lrcompress.training.distill import Teacher, open_teacher
from lrcompress.training.improve import improve, training_dtype
from lrcompress.training.rows import Rows, gather
from lrcompress.training.settings import Settings


@dataclass(frozen=True)
class HealSpec:
    """What to heal, on what text, how.

    data: SPECs as in calibration, or FILE.jsonl:PROMPT,ANSWER; samples: rows to train on at most; dense: the model to
    distill from, None for the one that the checkpoint's report names.
    """

    checkpoint: str
    data: Sequence[str] = ("python-docs",)
    samples: int = 1024
    seqlen: int = 512
    dense: str | None = None
    output: str | None = None
    settings: Settings = field(default_factory=Settings)
    trust_remote_code: bool = False


def heal(spec: HealSpec, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None) -> Result:
    """Train and write; the folder appears whole or not at all. Under `accelerate launch` every process calls this."""
    device = resolve_device(spec.settings.device)
    team = join(device)
    state = PartialState(cpu=device.type == "cpu")  # the Trainer's device, at one process too
    reporter = reporter or Reporter(quiet=True)
    if not team.first:
        reporter = Reporter(quiet=True)
    source = open_compressed(spec.checkpoint)
    manifest = read_manifest(source)
    assert manifest is not None
    settings = spec.settings.settled(manifest.modules)
    spec = replace(spec, settings=settings)
    sources = [_parsed(text) for text in spec.data]
    dense = _dense_model(spec, source)
    before = load_report(source)
    recipe = make_recipe(before["recipe"], "the checkpoint's report") if before is not None else None
    output = Path(spec.output or f"{short_name(spec.checkpoint)}-healed").expanduser()
    made_from = _made_from(source, dense, sources)
    if resume and (finished := _finished(output, spec, made_from)):
        reporter.say(f"{output} is finished already")
        return Result(output, finished)
    read = [source, *(data.path for data in sources if data.path is not None)]
    read += [] if dense is None or (local := check_model(dense)) is None else [local]
    workspace = Workspace(output, overwrite=overwrite, resume=resume, inputs=read)
    with workspace, errors_in_words(device, f"run again with --resume to continue {workspace.partial}"):
        if workspace.continued and (finished := _finished(workspace.partial, spec, made_from)):
            workspace.publish()
            return Result(output, finished)
        if team.first:
            _begin(workspace, source, spec, made_from)
        team.wait()
        if narrow := narrow_text(sources, "--data"):
            reporter.say(narrow)
        train, held_out = _rows(spec, source, dense, sources)
        teacher = None
        if settings.distill != "none":
            assert dense is not None
            dtype, trust = training_dtype(settings), spec.trust_remote_code
            walker = open_teacher(dense, state.device, dtype, trust_remote_code=trust)
            folder = workspace.scratch / f"teacher-{team.rank}"
            teacher = Teacher(walker, train, settings.batch, folder, features=settings.distill == "features")
        start = time.perf_counter()
        found = improve(
            workspace.partial, settings, train, held_out, teacher, workspace.scratch / "training", reporter,
            trust_remote_code=spec.trust_remote_code,
        )  # fmt: skip
        found |= {"asked": _asked(spec), "made_from": made_from, "dense": dense, "seconds": time.perf_counter() - start}
        report = _report(spec, before, found, reporter)
        if team.first:
            write_json(workspace.partial / "report.json", report)
            if recipe is not None:
                write_card(workspace.partial, report, recipe)
        workspace.publish()
    return Result(output, report)


def open_compressed(label: str) -> Path:
    """The folder of a checkpoint of ours; InputError where it is another."""
    check_model(label)
    folder = open_model(label).folder
    if read_manifest(folder) is None:
        raise InputError(f"{label} is no compressed checkpoint: compress it first")
    return folder


def _asked(spec: HealSpec) -> dict[str, Any]:
    """What must be equal for two runs to do the same."""
    asked = asdict(spec)
    del asked["output"]
    return {**asked, "data": list(spec.data)}


def _made_from(source: Path, dense: str | None, sources: Sequence[Source]) -> dict[str, Any]:
    """The files that a run reads, so far as they can be told apart without opening them."""
    return {
        "checkpoint": files_identity(source),
        "dense model": None if dense is None else model_identity(dense),
        "text": texts_identity(sources),
    }


def _finished(output: Path, spec: HealSpec, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a finished run of the same spec, None where there is none; InputError where its files changed."""
    report = read_report(output) or {}
    healed = report.get("healed")
    if not isinstance(healed, dict) or healed.get("asked") != _asked(spec):
        return None
    refuse_changed(output, healed.get("made_from"), made_from)
    return report


def _parsed(text: str) -> Source:
    source = split_source(text)
    if source.path is not None and not source.path.is_file():
        raise InputError(f"data {source.name} does not exist: give a file or one of the sources of --calibration")
    return source


def _dense_model(spec: HealSpec, folder: Path) -> str | None:
    """The dense model, where something needs it."""
    needed = spec.settings.distill != "none" or any(split_source(text).name == "self" for text in spec.data)
    if not needed:
        return None
    dense = spec.dense or (read_report(folder) or {}).get("model")
    if dense is None:
        raise InputError(
            f"{spec.checkpoint} has no report that names its dense model: name it with --dense, or give --distill none"
        )
    check_model(dense)
    return str(dense)


def _begin(workspace: Workspace, source: Path, spec: HealSpec, made_from: dict[str, Any]) -> None:
    """Copy the checkpoint but for its report, unless an earlier run has, and remember what this one is."""
    workspace.claim({"asked": _asked(spec), **made_from, "versions": versions()})
    workspace.check_room(3 * sum(path.stat().st_size for path in source.iterdir() if path.is_file()))
    copied = workspace.scratch / "copied"
    if not copied.exists():
        with disk_errors(workspace.partial):
            files = [path for path in source.iterdir() if path.is_file() and path.name != "report.json"]
            copy_files(source, [*files, *files_in_folders(source)], workspace.partial)
            copied.touch()


def _rows(spec: HealSpec, source: Path, dense: str | None, sources: list[Source]) -> tuple[Rows, Rows]:
    tokenizer = load_tokenizer(source, trust_remote_code=spec.trust_remote_code)
    folder = open_model(dense).folder if dense is not None else source
    return gather(
        sources, spec.samples, spec.seqlen, tokenizer, spec.settings.seed, folder,
        trust_remote_code=spec.trust_remote_code,
    )  # fmt: skip


def _report(spec: HealSpec, before: dict[str, Any] | None, found: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """The checkpoint's report with what healing did; what was measured of the old weights goes."""
    kept = {key: value for key, value in (before or {}).items() if key not in ("evaluation", "held_out")}
    trained_on = dict.fromkeys([*kept.get("trained_on", []), *spec.data])
    return {
        "schema": 1,
        "model": spec.checkpoint,
        **kept,
        "healed": found,
        "trained_on": list(trained_on),
        "warnings": [*kept.get("warnings", []), *reporter.warnings],
        "versions": versions(),
    }
