"""`compress --refine`: a brief training against the dense model, before a checkpoint is published."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.parallel.processes import processes
from lrcompress.report.progress import Reporter
from lrcompress.stages.opened import Opened
from lrcompress.training.distill import Teacher
from lrcompress.training.improve import improve
from lrcompress.training.rows import Rows
from lrcompress.training.settings import Settings

STEP_TOKENS = 2048
"""Tokens of a step, in whole blocks."""


def refine(opened: Opened, folder: Path, scratch: Path, reporter: Reporter) -> dict[str, Any]:
    """Train the scales, where weights are coded, or else the factors of what was written into `folder`; see `improve`.

    That takes the recipe's minutes, and its calibration text.

    The held-out windows of the calibration judge. The dense model stays in its files, a block in memory at a time.
    Several processes share the rows of a step.
    """
    request = opened.request
    recipe, calibration = request.recipe, opened.calibration
    assert calibration is not None
    PartialState(cpu=request.device.type == "cpu")
    ids = calibration.ids
    if not len(ids):  # the method itself read no text
        tokenizer = opened.model.tokenizer(trust_remote_code=recipe.trust_remote_code)
        dense, trust = opened.model.folder, recipe.trust_remote_code
        ids = calibration_blocks(request.sources, tokenizer, recipe.seed, dense, trust_remote_code=trust).ids
    rows, held_out = Rows.of_blocks(ids), Rows.of_blocks(calibration.held_out)
    manifest = read_manifest(folder)
    assert manifest is not None
    settings = Settings(
        distill="features",
        minutes=recipe.refine,
        batch=max(1, STEP_TOKENS // ids.shape[1]),
        seed=recipe.seed,
        device=str(request.device),
    ).settled(manifest.modules)
    if settings.train == "scales":
        settings = replace(settings, distill="logits")
    states, features = scratch / f"teacher-{processes().rank}", settings.distill == "features"
    teacher = Teacher(opened.walker, rows, settings.batch, states, features=features)
    return improve(
        folder, settings, rows, held_out, teacher, scratch / "training", reporter,
        trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip
