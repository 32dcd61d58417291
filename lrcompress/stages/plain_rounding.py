"""What everybody could do without a text: every weight to the nearest number of its group's grid."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrcompress.bases import Base, parse_base
from lrcompress.budget import bits_per_weight
from lrcompress.calibration.collect import InputCollector
from lrcompress.formats import spec_bytes
from lrcompress.methods.ecsq import relative_error_of, weight_of
from lrcompress.model.samples import Sample
from lrcompress.protocols import InputStatistics, Site
from lrcompress.report.progress import Reporter
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.rate_curve import Known, loss_of

PLAIN = ("rtn:8:64", "rtn:4:64", "rtn:3:64", "rtn:2:64")
READ = 4
"""Calibration samples that the loss of plain rounding is predicted on."""


@dataclass(frozen=True)
class Plain:
    """A plain rounding: bytes of the checkpoint; loss: predicted, as `rate_curve.loss_of` has it, or unknown."""

    base: str
    bits: float
    bytes: int
    loss: float | None = None


def plain_roundings(
    opened: Opened, artefacts: Artefacts | None, known: Known | None, other: int, reporter: Reporter
) -> list[Plain]:
    """Every plain rounding of PLAIN, with its loss where the weights have been decomposed, `known` their summaries.

    other: bytes of all that is not rounded.
    """
    bases, total = [parse_base(text) for text in PLAIN], sum(site.shape[0] * site.shape[1] for site in opened.sites)
    found = []
    for base in bases:
        stored = sum(spec_bytes(base.spec(site.shape), opened.dtype.itemsize) for site in opened.sites)
        found.append(Plain(base.text, bits_per_weight(stored, total), other + stored))
    if artefacts is None or known is None:
        return found
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
