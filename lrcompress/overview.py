"""What could be done with a model: its size, its weights by kind, and what every size would take and give."""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from lrcompress.checkpoint.cache import statistics_folder
from lrcompress.errors import InputError
from lrcompress.evaluation.in_use import InUse, planned_in_use
from lrcompress.formats.coded import Coded
from lrcompress.model.device import fast_float32
from lrcompress.pipeline import profile_model
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
from lrcompress.stages.plain_rounding import Plain, plain_roundings
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.rate_curve import Unit, losses, reach, unit_of
from lrcompress.stages.request import check_request

BITS = (8.0, 6.0, 4.0, 3.0, 2.5, 2.0)
TYPICAL = 2**24
"""Numbers of a weight that decoding is measured on, at most."""

Predict = Literal["no", "kept", "yes"]


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
    plain = plain_roundings(opened, artefacts, known, other, reporter)
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
