"""What cutting one weight costs: the true divergence of the model's predictions, measured weight by weight."""

import math
import statistics

import torch
from torch import Tensor, nn

from lrcompress.calibration.gradients import CHUNK
from lrcompress.calibration.hidden import HiddenStates
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.methods import Method
from lrcompress.processes import processes
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
    ids = opened.calibration.ids[:SAMPLES]
    inside = sorted((site for site in opened.sites if site.block < blocks), key=lambda site: site.block)
    cuts = {site.name: len(ids) * (1 + place) for place, site in enumerate(inside)}
    width = walker.embed(ids[0]).shape[-1]
    shape = (len(ids) * (1 + len(inside)), ids.shape[1], width)
    states = HiddenStates(artefacts.folder / "cuts.bin", shape, walker.dtype)
    with disk_errors(artefacts.folder), reporter.timed("sensitivity"):
        for sample, tokens in enumerate(ids):
            states.write(sample, walker.embed(tokens))
        errors: dict[str, float] = {}
        live = len(ids)
        with reporter.phase("cut one weight at a time", blocks) as tick:
            for block in range(blocks):
                with walker.block(block) as module:
                    for site in opened.sites_of(block):
                        with installed(opened, _cut(opened, artefacts, site, errors)):
                            for sample in range(len(ids)):
                                _run(opened, block, module, states, sample, cuts[site.name] + sample, site.name)
                    for place in range(live):
                        _run(opened, block, module, states, place, place, inside[max(0, place // len(ids) - 1)].name)
                live += len(ids) * len(opened.sites_of(block))
                tick()
        divergences = _divergences(opened, artefacts, states, ids, cuts, errors)
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
    curve = method.curve(site, opened.dtype.itemsize)
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
    hidden = walker.run(block, module, states.read(source).to(walker.device, walker.dtype))
    if not all_finite(hidden):
        raise InputError(f"with {cut} cut, {walker.blocks[block]} puts out non-finite numbers: leave it out (--ignore)")
    states.write(target, hidden)


def _divergences(
    opened: Opened,
    artefacts: Artefacts,
    states: HiddenStates,
    ids: Tensor,
    cuts: dict[str, int],
    errors: dict[str, float],
) -> dict[str, float]:
    """Mean divergence per site, those outside the blocks cut here."""
    walker = opened.walker
    outside = {site.name: _cut(opened, artefacts, site, errors) for site in opened.sites_of(len(opened.blocks))}
    total: dict[str, float] = {}
    counted = 0
    for sample, tokens in enumerate(ids):
        for start in range(min(SKIPPED, len(tokens) - 1), len(tokens), CHUNK):
            part = slice(start, start + CHUNK)

            def logs(place: int, tokens: Tensor = tokens, part: slice = part) -> Tensor:
                hidden = states.read(place)[:, part].to(walker.device, walker.dtype)
                return walker.logits(tokens[part].to(walker.device), hidden)[0].float().log_softmax(-1)

            dense = logs(sample)
            counted += len(dense)
            for name, first in cuts.items():
                total[name] = total.get(name, 0.0) + _kl(dense, logs(first + sample))
            for name, cut in outside.items():
                with installed(opened, cut):
                    total[name] = total.get(name, 0.0) + _kl(dense, logs(sample))
    return {name: value / counted for name, value in total.items()}


def _kl(dense: Tensor, other: Tensor) -> float:
    """Sum over the rows of KL(dense || other), both log probabilities; never below zero."""
    found = float(nn.functional.kl_div(other, dense, reduction="none", log_target=True).sum(dtype=torch.float64))
    if not math.isfinite(found):
        raise InputError(
            "the divergence of a cut weight's predictions is not finite: use metric=input or another --dtype"
        )
    return max(found, 0.0)
