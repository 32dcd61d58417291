"""What could be done with a model: its size, its weights by kind, and what every size would take and give."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from lrcompress.bases import Base, parse_base
from lrcompress.budget import bits_per_weight
from lrcompress.calibration.collect import InputCollector
from lrcompress.checkpoint.cache import statistics_folder
from lrcompress.errors import InputError
from lrcompress.evaluation.in_use import InUse, planned_in_use
from lrcompress.formats import spec_bytes
from lrcompress.formats.coded import Coded
from lrcompress.methods.ecsq import relative_error_of, weight_of
from lrcompress.model.device import fast_float32
from lrcompress.model.samples import Sample
from lrcompress.pipeline import profile_model
from lrcompress.protocols import InputStatistics, Site
from lrcompress.recipe import HOW_MUCH, Recipe
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import block_and_kind
from lrcompress.stages.allocate import summaries
from lrcompress.stages.calibrate import calibrate_model
from lrcompress.stages.in_words import errors_in_words
from lrcompress.stages.kept import KeptStatistics
from lrcompress.stages.needs import Needs, check_memory, needs
from lrcompress.stages.opened import Opened
from lrcompress.stages.opening import open_parts
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.rate_curve import Unit, loss_of, losses, reach, unit_of
from lrcompress.stages.request import check_request

BITS = (8.0, 6.0, 4.0, 3.0, 2.5, 2.0)
PLAIN = ("rtn:8:64", "rtn:4:64", "rtn:3:64", "rtn:2:64")
"""What everybody could do without a text: every weight to the nearest number of its group's grid."""
READ = 4
"""Calibration samples that the loss of plain rounding is predicted on."""
TYPICAL = 2**24
"""Numbers of a weight that decoding is measured on, at most."""

Predict = Literal["no", "kept", "yes"]


@dataclass(frozen=True)
class Plain:
    """Plain rounding: bytes of the checkpoint; loss as of a Choice."""

    base: str
    bits: float
    bytes: int
    loss: float | None = None


@dataclass(frozen=True)
class Choice:
    """A size: bits for each of the compressed weights, bytes of the checkpoint, at most.

    loss: predicted, in the overview's unit, None where nothing is known of the text. memory: bytes that the loaded
    model holds; speed of its decoding, times dense's, measured here; None where that was not asked for. plain: the
    plain rounding that is nearest in bytes.
    """

    bits: float
    bytes: int
    plain: Plain
    loss: float | None = None
    memory: int | None = None
    speed: float | None = None


@dataclass(frozen=True)
class Overview:
    """bytes: of the model as it would be written; numbers: weights that are compressed, by kind.

    other: bytes of all else; free: bytes of memory that are there now; least: the fewest bits a weight that can be had;
    unit: of the losses, None where there are none.
    """

    model: str
    method: str
    metric: str
    dtype: str
    blocks: int
    bytes: int
    numbers: dict[str, int]
    other: int
    needs: Needs
    free: int
    least: float
    choices: list[Choice]
    unit: Unit | None = None

    def as_json(self) -> dict[str, Any]:
        """The result of a plan for which no amount was asked."""
        return {"schema": 1, **asdict(self)}


@fast_float32()
def overview(
    recipe: Recipe, *, predict: Predict = "no", in_use: bool = False, reporter: Reporter | None = None
) -> Overview:
    """What the recipe's model could become, whatever amount the recipe asks for.

    Losses are predicted as `predict` says: `kept` where the method reads no text, or where a named cache keeps the
    statistics of the recipe's; where they are not, no weights are read. `in_use`: memory and speed are measured.
    """
    request, reporter = check_request(recipe), reporter or Reporter(quiet=True)
    method = request.method
    if not method.sizes_are_estimates:
        raise InputError(f"method {method.name} has no table of sizes, auto and ecsq have: {HOW_MUCH}")
    in_words = errors_in_words(request.device, "a plan leaves nothing behind, run it again")
    with tempfile.TemporaryDirectory(prefix="lrcompress-plan-") as scratch, in_words:
        opened = open_parts(request, reporter)
        predicted = predict == "yes" or (predict == "kept" and not method.needs_statistics)
        if predicted or (predict == "kept" and statistics_folder() is not None):
            calibrate_model(opened, reporter)
            predicted = predicted or KeptStatistics(opened).complete()
        needed, artefacts = needs(opened), None
        if predicted:
            check_memory(opened, needed, reporter)
            artefacts = profile_model(opened, Path(scratch), reporter)
        return _overview(opened, artefacts, needed, _in_use(opened) if in_use else {}, reporter)


def _overview(
    opened: Opened, artefacts: Artefacts | None, needed: Needs, used: dict[float, InUse], reporter: Reporter
) -> Overview:
    numbers: dict[str, int] = {}
    for site in opened.sites:
        kind = block_and_kind(site.name)[1]
        numbers[kind] = numbers.get(kind, 0) + site.shape[0] * site.shape[1]
    total, size = sum(numbers.values()), opened.dtype.itemsize
    whole = opened.dense_checkpoint_bytes
    other = whole - sum(site.dense_bytes(size) for site in opened.sites)
    least, most = reach(opened)
    every = [bits for bits in BITS if least <= bits < most]
    known = None if artefacts is None else summaries(opened, artefacts)
    lost = [None] * len(every) if known is None else losses(opened, known, every)
    plain = _plain(opened, artefacts, other, reporter)
    choices = []
    for bits, loss in zip(every, lost, strict=True):
        stored = int(other + total * bits / 8)
        choice = Choice(bits, stored, min(plain, key=lambda rounding: abs(rounding.bytes - stored)), loss)
        if bits in used:
            choice = replace(choice, memory=int(other + total * used[bits].bits / 8), speed=used[bits].speed)
        choices.append(choice)
    dtype, free = str(opened.dtype).removeprefix("torch."), psutil.virtual_memory().available
    unit = None if artefacts is None else unit_of(opened)
    return Overview(
        opened.request.recipe.model, opened.request.method.name, opened.request.method.metric, dtype,
        len(opened.blocks), whole, numbers, other, needed, free, least, choices, unit,
    )  # fmt: skip


def _plain(opened: Opened, artefacts: Artefacts | None, other: int, reporter: Reporter) -> list[Plain]:
    """Every plain rounding, with its loss where the weights have been decomposed."""
    bases, total = [parse_base(text) for text in PLAIN], sum(site.shape[0] * site.shape[1] for site in opened.sites)
    found = []
    for base in bases:
        stored = sum(spec_bytes(base.spec(site.shape), opened.dtype.itemsize) for site in opened.sites)
        found.append(Plain(base.text, bits_per_weight(stored, total), other + stored))
    if artefacts is None:
        return found
    known = summaries(opened, artefacts)
    lost = (loss_of(opened, errors, known) for errors in _rounded(opened, artefacts, bases, reporter))
    return [replace(plain, loss=loss) for plain, loss in zip(found, lost, strict=True)]


def _rounded(opened: Opened, artefacts: Artefacts, bases: Sequence[Base], reporter: Reporter) -> list[float]:
    """Squared errors of all weights together, rounded as each of the bases does."""
    errors = [0.0] * len(bases)
    with reporter.phase("plain rounding", len(opened.sites)) as tick:
        for sites, inputs in _read(opened):
            for site in sites:
                artefact = artefacts.load(site)
                weight, own = weight_of(artefact), inputs.get(site.group)
                for place, base in enumerate(bases):
                    rounded = base.compress(weight, None).dense
                    errors[place] += float(artefact["total"]) * relative_error_of(artefact, rounded, own)
                tick()
    return errors


def _read(opened: Opened) -> Iterator[tuple[list[Site], dict[str, Tensor]]]:
    """The sites of one block after the other, and by group the second moment of what they read, first tokens left out.

    The method's own statistics count those more. Their inputs may be huge and their gradients are small, but a metric
    of two factors takes one for independent of the other: feedback then errs elsewhere, and plain rounding seems to
    lose fifty times what it does. None of a method without statistics, nor outside of the blocks.
    """
    method, walker, blocks = opened.request.method, opened.walker, len(opened.blocks)
    counted: list[Sample] = []
    if opened.calibration is not None and method.needs_statistics:
        counted = opened.calibration.samples[:READ]
    with torch.no_grad():
        states = [walker.embed(sample) for sample in counted]
        weights = torch.ones(max((len(sample) for sample in counted), default=1))
        weights[0] = 0.0
        for block in range(blocks):
            sites = opened.sites_of(block)
            inputs: dict[str, InputStatistics] = {}
            if states:
                with walker.block(block) as module, InputCollector(walker.model, sites, weights) as collector:
                    for place, sample in enumerate(counted):
                        collector.weigh(len(sample))
                        states[place] = walker.run(block, module, states[place], sample)
                inputs = collector.summed(walker.device)
            yield sites, {name: part.gram(centred=method.metric == "centred") for name, part in inputs.items()}
    yield opened.sites_of(blocks) + opened.embeddings, {}


def _in_use(opened: Opened) -> dict[float, InUse]:
    """By bits, what the largest weight costs in use."""
    rows, columns = max((site.shape for site in opened.sites if not site.lookup), key=lambda shape: shape[0] * shape[1])
    shape = [max(1, min(rows, TYPICAL // columns)), columns]
    dtype = str(opened.dtype).removeprefix("torch.")
    found = {}
    for bits in BITS:
        target = {"format": Coded.name, "shape": shape, "bytes": round(shape[0] * shape[1] * bits / 8)}
        used = planned_in_use({"targets": [target], "dtype": dtype})
        if used is not None:
            found[bits] = used
    return found
