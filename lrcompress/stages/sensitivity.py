"""What cutting one weight costs: the true divergence of the model's predictions, measured weight by weight."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrcompress.calibration.gradients import CHUNK
from lrcompress.calibration.hidden import HiddenStates
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.methods import Method
from lrcompress.model.samples import UNSCORED, Sample
from lrcompress.parallel.processes import processes
from lrcompress.precision import wide
from lrcompress.protocols import Curve, Site, Spec
from lrcompress.report.progress import Reporter
from lrcompress.stages.encode import as_encoded, encode_site
from lrcompress.stages.held_out import installed
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.workspace import write_json

SAMPLES = 2
"""Calibration samples that the divergences are averaged over."""

ROUNDING = 1e-9
"""Share of a weight's squared size below which its error is rounding."""

SKIPPED = 16
"""First tokens of a sample that do not count: a text that has hardly begun is hard to predict for any model."""


@torch.no_grad()
def measure_sensitivities(opened: Opened, artefacts: Artefacts, reporter: Reporter) -> None:
    """Note in `artefacts`, per site, the divergence that a cut of it alone causes per unit of its squared error.

    The mean Kullback-Leibler divergence of the next token's distribution from the dense model's. The blocks are walked
    once: hidden states in which one weight was cut go on beside the dense ones, in a scratch file.
    """
    if artefacts.sensitivities is not None or not processes().first:
        return
    assert opened.calibration is not None
    walker, blocks = opened.walker, len(opened.blocks)
    samples = opened.calibration.samples[:SAMPLES]
    inside = sorted((site for site in opened.sites if site.block < blocks), key=lambda site: site.block)
    cuts = {site.name: len(samples) * (1 + place) for place, site in enumerate(inside)}
    width, copies = walker.embed(samples[0]).shape[-1], samples * (1 + len(inside))
    shape = (len(copies), max(map(len, samples)), width)
    states = HiddenStates(artefacts.folder / "cuts.bin", shape, walker.dtype, copies)
    with disk_errors(artefacts.folder), reporter.timed("sensitivity"):
        for place, sample in enumerate(samples):
            states.write(place, walker.embed(sample))
        errors: dict[str, float] = {}
        live = len(samples)
        with reporter.phase("cut one weight at a time", blocks) as tick:
            for block in range(blocks):
                with walker.block(block) as module:
                    for site in opened.sites_of(block):
                        with installed(opened, _cut(opened, artefacts, site, errors)):
                            for place in range(len(samples)):
                                _run(opened, block, module, states, place, cuts[site.name] + place, site.name)
                    for place in range(live):
                        cut = inside[max(0, place // len(samples) - 1)].name
                        _run(opened, block, module, states, place, place, cut)
                live += len(samples) * len(opened.sites_of(block))
                tick()
        divergences = _divergences(opened, artefacts, states, samples, cuts, errors)
    states.path.unlink()
    write_json(artefacts.sensitivity_path, _scales(opened, artefacts, divergences, errors))


def _scales(
    opened: Opened, artefacts: Artefacts, divergences: dict[str, float], errors: dict[str, float]
) -> dict[str, float]:
    """Divergence per unit of squared error by site.

    A cut that did nothing, for its error is rounding alone or no token of the samples came there, says nothing about
    other cuts: such a weight gets the median of its kind, or of all.
    """
    known, kinds = dict[str, float](), dict[str, list[float]]()
    for site in opened.sites:
        total = float(artefacts.load(site, ("total",))["total"])
        if divergences[site.name] > 0 and errors[site.name] > ROUNDING * total:
            known[site.name] = divergences[site.name] / errors[site.name]
            kinds.setdefault(_kind(site), []).append(known[site.name])
    middle = statistics.median(known.values()) if known else 1.0
    medians = {kind: statistics.median(values) for kind, values in kinds.items()}
    return {site.name: known.get(site.name, medians.get(_kind(site), middle)) for site in opened.sites}


def _kind(site: Site) -> str:
    """A weight's own name, that of every expert's alike."""
    return site.name.rpartition(".")[2]


def cut_level(method: Method, curve: Curve) -> int:
    """The level below dense whose bytes are nearest to the part of the dense ones that the method is cut to."""
    return int((curve.bytes[:-1] - method.cut * curve.dense_bytes).abs().argmin())


def _cut(
    opened: Opened, artefacts: Artefacts, site: Site, errors: dict[str, float]
) -> dict[str, tuple[Spec, dict[str, Tensor]]]:
    """`site` as it is stored at its cut, for store.installed; its squared error goes to `errors`."""
    method, artefact = opened.request.method, artefacts.load(site)
    curve = method.curve_of(site, opened.dtype.itemsize)
    if len(curve.ranks) < 2:  # never anything but dense
        errors[site.name] = 0.0
        return {}
    level = cut_level(method, curve)
    errors[site.name] = float(artefact["errors"][level])
    spec = method.spec(site, int(curve.ranks[level]), opened.dtype.itemsize)
    stored = encode_site(opened, site, spec, artefact)
    return {site.name: (as_encoded(spec, stored), stored)}


def _run(
    opened: Opened, block: int, module: nn.Module, states: HiddenStates, source: int, target: int, cut: str
) -> None:
    walker = opened.walker
    state = states.read(source).to(walker.device, walker.dtype)
    hidden = walker.run(block, module, state, states.sample(source))
    if not all_finite(hidden):
        raise InputError(f"with {cut} cut, {walker.blocks[block]} puts out non-finite numbers: leave it out (--ignore)")
    states.write(target, hidden)


def _divergences(
    opened: Opened,
    artefacts: Artefacts,
    states: HiddenStates,
    samples: Sequence[Sample],
    cuts: dict[str, int],
    errors: dict[str, float],
) -> dict[str, float]:
    """Mean divergence per site, those outside the blocks cut here."""
    walker = opened.walker
    outside = {site.name: _cut(opened, artefacts, site, errors) for site in opened.sites_of(len(opened.blocks))}
    total: dict[str, float] = {}
    counted = 0
    for own, sample in enumerate(samples):
        for start in range(min(SKIPPED, len(sample) - 1), len(sample), CHUNK):
            part = slice(start, start + CHUNK)
            counts = sample.labels[part] != UNSCORED

            def logs(place: int, sample: Sample = sample, part: slice = part, counts: Tensor = counts) -> Tensor:
                hidden = states.read(place)[:, part].to(walker.device, walker.dtype)
                found = walker.logits(sample.words[part].to(walker.device), hidden)[0]
                return found[counts.to(walker.device)].float().log_softmax(-1)

            dense = logs(own)
            counted += len(dense)
            for name, first in cuts.items():
                total[name] = total.get(name, 0.0) + _kl(dense, logs(first + own))
            for name, cut in outside.items():
                with installed(opened, cut):
                    total[name] = total.get(name, 0.0) + _kl(dense, logs(own))
    return {name: value / counted for name, value in total.items()}


def _kl(dense: Tensor, other: Tensor) -> float:
    """Sum over the rows of KL(dense || other), both log probabilities; never below zero."""
    found = float(nn.functional.kl_div(other, dense, reduction="none", log_target=True).sum(dtype=wide(dense.device)))
    if not math.isfinite(found):
        raise InputError(
            "the divergence of a cut weight's predictions is not finite: use metric=input or another --dtype"
        )
    return max(found, 0.0)
