"""The largest ratio that a loss allows, found by checkpoints that are written, loaded again and measured."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lrcompress.allocators.base import largest_ratio
from lrcompress.calibration.drawing import held_out_blocks
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.errors import InputError, NumericalError
from lrcompress.evaluation.loading import load_model
from lrcompress.evaluation.tokens import token_perplexity
from lrcompress.parallel.processes import processes
from lrcompress.report.progress import Reporter
from lrcompress.stages.allocate import summaries
from lrcompress.stages.next_ratio import Predicted, Tried, next_ratio
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import Artefacts, HiddenWalk
from lrcompress.stages.rate_curve import NATS, squared_errors
from lrcompress.stages.workspace import write_json

TOLERANCE, USED, MOST = 0.02, 0.9, 8
"""The search ends where the next candidate could be smaller by such a part only, where a candidate uses so much of the
loss that is allowed, or after so many candidates."""

WINDOWS = 8
"""Held-out windows of every source that a candidate is measured on, at most."""

Write = Callable[[Opened, Path, Path, Reporter], dict[str, Any]]
"""Writes the checkpoint of an opened request into a folder, with scratch files in another; returns its report."""


def search(
    opened: Opened, artefacts: Artefacts | None, scratch: Path, reporter: Reporter, write: Write
) -> dict[str, Any]:
    """The `search` of report.json; its `ratio` is that of the smallest candidate within `max_loss`.

    Candidates are remembered as they are measured, and not measured again. Several processes write each of them
    together, and the first one measures it.
    """
    limit, largest = opened.request.recipe.max_loss, reachable(opened)
    assert limit is not None
    blocks = _windows(opened)
    journal = scratch / "search.json"
    team = processes()
    known = json.loads(journal.read_text()) if journal.exists() else {"dense": None, "candidates": []}
    known = team.gather(known)[0]
    if known["dense"] is None:
        known["dense"] = team.gather(_perplexity(opened, opened.model.folder, blocks) if team.first else None)[0]
        _remember(journal, known)
    dense = known["dense"]
    reporter.say(
        f"searching ratios up to {largest:.4f} for a perplexity of at most {(1 + limit) * dense:.4g} "
        f"on {len(blocks)} held-out windows, dense {dense:.4g}"
    )
    predicted = _predicted(opened, artefacts)
    nats = NATS if opened.request.method.needs_gradients else None
    low, high, tried = 0.0, largest, list[dict[str, Any]]()
    while not tried or not _finished(tried, low, high, limit):
        measured = [Tried(t["ratio"], None if t["loss"] is None else math.log1p(t["loss"])) for t in tried]
        ratio = round(next_ratio(measured, low, high, math.log1p(limit), predicted, nats), 6)
        if len(tried) == len(known["candidates"]):
            ratio = team.gather(ratio)[0]
            known["candidates"].append(_measure(opened, ratio, scratch, blocks, dense, write))
            _remember(journal, known)
        found = known["candidates"][len(tried)]
        tried.append(found)
        size = "" if found["bytes"] is None else f"{found['bytes'] / 1e6:.2f} MB, "
        reporter.say(f"  ratio {found['ratio']:.4f}: {size}perplexity {_loss_text(found)}")
        low, high = (found["ratio"], high) if _within(found, limit) else (low, found["ratio"])
    allowed = [found for found in tried if _within(found, limit)]
    if not allowed:
        mildest = min(tried, key=lambda found: float("inf") if found["loss"] is None else found["loss"])
        raise InputError(
            f"max_loss {limit:.4g}: the mildest of {len(tried)} candidates, ratio {mildest['ratio']:.4f}, has a "
            f"perplexity of {_loss_text(mildest)} already: keep the dense model, or allow that loss"
        )
    chosen = min(allowed, key=lambda found: (found["bytes"], -found["ratio"]))
    return {
        "max_loss": limit,
        "dense_perplexity": dense,
        "windows": len(blocks),
        "range": [0.0, largest],
        **chosen,
        "candidates": tried,
    }


def as_held_out(found: dict[str, Any], length: int) -> dict[str, Any]:
    """The `held_out` of report.json, of what a search `found` on windows of `length` tokens: one figure for both."""
    measured = {"perplexity": found["perplexity"], "before": found["dense_perplexity"]}
    return {"windows": found["windows"], **measured, "contexts": [{"tokens": length, **measured}]}


def _finished(tried: Sequence[dict[str, Any]], low: float, high: float, limit: float) -> bool:
    """Whether another candidate would gain next to nothing, or there were enough."""
    used = any(_within(found, limit) and found["loss"] >= USED * limit for found in tried)
    return used or high - low <= TOLERANCE * (1 - high) or len(tried) >= MOST


def _predicted(opened: Opened, artefacts: Artefacts | None) -> Predicted | None:
    """The squared errors of all weights together, by ratio; None where nothing was decomposed."""
    if artefacts is None:
        return None
    known = summaries(opened, artefacts)
    return lambda ratio: squared_errors(replace(opened, request=replace(opened.request, searched=ratio)), known)


def reachable(opened: Opened) -> float:
    """The largest ratio that the method has levels for: eora's is that of its base alone."""
    curves = [choice.asked for choice in opened.costs()]
    largest = largest_ratio(sum(int(c.bytes[0]) for c in curves), sum(c.dense_bytes for c in curves))
    if largest <= 0:
        raise InputError(f"method {opened.request.method.name} has no choice here that is smaller than dense weights")
    return largest


def branch(opened: Opened, scratch: Path, own: Path) -> None:
    """An empty scratch folder `own` for one of several checkpoints that share the decompositions in `scratch`."""
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    last = HiddenWalk(opened, scratch / "hidden").held_out_path(len(opened.blocks))
    if last.exists():
        (own / "hidden").mkdir()
        try:
            os.link(last, own / "hidden" / last.name)
        except OSError:  # not every file system has links
            with disk_errors(own):
                shutil.copyfile(last, own / "hidden" / last.name)


def _remember(journal: Path, known: dict[str, Any]) -> None:
    if processes().first:
        write_json(journal, known)


def _windows(opened: Opened) -> Tensor:
    """(blocks, length) held-out calibration text that candidates are measured on."""
    recipe = opened.request.recipe
    trust, folder = recipe.trust_remote_code, opened.model.folder
    tokenizer = opened.model.tokenizer(trust_remote_code=trust)
    return held_out_blocks(opened.request.sources, tokenizer, recipe.seed, folder, WINDOWS, trust_remote_code=trust)


def _measure(opened: Opened, ratio: float, scratch: Path, blocks: Tensor, dense: float, write: Write) -> dict[str, Any]:
    """Write, load, measure and remove one candidate.

    Its perplexity is None where its logits are not finite, its bytes too where it cannot be written: of several
    processes the others would wait for one that cannot, so that this ends the run.
    """
    own, folder, team = scratch / "candidate-scratch", scratch / "candidate", processes()
    impossible = (ArithmeticError, NumericalError)
    if team.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        branch(opened, scratch, own)
    team.wait()
    silent = Reporter(quiet=True)
    silent.console.quiet = True  # a candidate's warnings are no matter of the result's
    asked = replace(opened, request=replace(opened.request, searched=ratio))
    size = perplexity = None
    with contextlib.suppress(*impossible if team.size == 1 else ()):
        size = write(asked, folder, own, silent)["bytes"]["checkpoint"]
    if size is not None and team.first:
        with contextlib.suppress(*impossible):
            perplexity = _perplexity(asked, folder, blocks)
    perplexity = team.gather(perplexity)[0]
    if team.first:
        shutil.rmtree(own)
        shutil.rmtree(folder)
    return {
        "ratio": ratio,
        "bytes": size,
        "perplexity": perplexity,
        "loss": None if perplexity is None else perplexity / dense - 1,
    }


def _perplexity(opened: Opened, folder: Path, blocks: Tensor) -> float:
    recipe = opened.request.recipe
    loaded = load_model(str(folder), device=recipe.device, trust_remote_code=recipe.trust_remote_code)
    return float(token_perplexity(loaded.model, blocks, lambda: None)["token_perplexity"])


def _within(found: dict[str, Any], limit: float) -> bool:
    return found["loss"] is not None and found["loss"] <= limit


def _loss_text(found: dict[str, Any]) -> str:
    return "beyond all numbers" if found["loss"] is None else f"{found['perplexity']:.5g} ({found['loss']:+.2%})"
