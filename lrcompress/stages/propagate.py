"""Sequential propagation: once the levels are known, every block is decomposed on what the compressed ones give it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.calibration.collect import collect_beside_dense, collect_outside, run_sample
from lrcompress.calibration.gradients import with_gradients
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.parallel.processes import processes
from lrcompress.precision import split
from lrcompress.protocols import InputStatistics, Site, Spec
from lrcompress.report.progress import Reporter
from lrcompress.stages.allocate import Plan
from lrcompress.stages.decompose import Found, decompose_block, decomposition_cost
from lrcompress.stages.held_out import installed
from lrcompress.stages.lengths import Lengths
from lrcompress.stages.opened import Opened
from lrcompress.stages.phases import PROPAGATE
from lrcompress.stages.profile import STORED, SUMMARY, Artefacts, HiddenWalk


def propagate(opened: Opened, plan: Plan, first: Artefacts | None, scratch: Path, reporter: Reporter) -> Artefacts:
    """Decompose every site again, its inputs those that the compressed blocks before it give; finished blocks are kept.

    `first` are the artefacts of the dense model's pass, where one was made: its gradients serve here too. With
    toward_dense every weight aims at what the dense model gives for the same text.
    """
    artefacts, lengths = Artefacts(scratch / "sequential"), Lengths(opened, plan)
    blocks, ranks = len(opened.blocks), {name: spec.rank for name, spec in plan.specs.items()}
    paired = opened.request.method.options.toward_dense > 0
    dense = HiddenWalk(opened, scratch / "hidden", calibrate=paired)
    own = HiddenWalk(opened, scratch / "hidden", "compressed", hold_out=False)
    walk_dense = paired or not processes().least(dense.there(blocks))
    walks, finished = [own, dense] if walk_dense else [own], artefacts.leading(blocks)
    if not processes().least(all(walk.there(finished) for walk in walks)):
        finished = 0
    embeddings = _embed(opened, plan, first, artefacts, lengths)
    starts = []
    for walk in walks:
        with installed(opened, embeddings if walk is own else {}):
            starts.append(walk.start(finished))
    start = min(starts)
    for block in range(start):
        lengths.recall(artefacts, block)
    with reporter.phase(PROPAGATE, blocks * own.calibrated) as tick:
        for block in range(blocks):
            if block < start:
                tick.skip(own.calibrated)
                continue
            with opened.walker.block(block) as module:
                sites, before = opened.sites_of(block), own.calibration(block)
                with reporter.timed("calibrate"):
                    if walk_dense:
                        dense.step(block, module, [], lambda: None)
                    beside = dense.calibration(block) if paired else None
                    inputs = collect_beside_dense(opened.walker, block, module, before, beside, sites, own.weights)
                found = decompose_block(opened, block, _with_gradients(opened, inputs, first, sites), reporter, ranks)
                encoded = lengths.encode(found, block)
                with reporter.timed("calibrate"):
                    _run_compressed(opened, plan, block, module, encoded, own, tick)
                artefacts.save(block, _kept(found, encoded))
            own.drop(block - 1)
            if walk_dense:
                dense.drop(block - 1)
    outside = opened.sites_of(blocks)
    if outside and not artefacts.done(blocks):
        inputs = collect_outside(opened.walker, own.samples, own.calibration(blocks), outside, own.weights)
        found = decompose_block(opened, blocks, _with_gradients(opened, inputs, first, outside), reporter, ranks)
        artefacts.save(blocks, _kept(found, lengths.encode(found, blocks)))
    elif outside:
        lengths.recall(artefacts, blocks)
    return artefacts


def _embed(
    opened: Opened, plan: Plan, first: Artefacts | None, artefacts: Artefacts, lengths: Lengths
) -> dict[str, tuple[Spec, dict[str, Tensor]]]:
    """The input embeddings as they will be stored: they come before all blocks, by the statistics of the first pass."""
    block, sites = len(opened.blocks) + 1, opened.embeddings
    if sites and artefacts.done(block):
        lengths.recall(artefacts, block)
    elif sites:
        assert first is not None
        mine = [sites[place] for place in processes().own([decomposition_cost(site) for site in sites])]
        found = {site.name: first.load(site) for site in mine}
        artefacts.save(block, _kept(found, lengths.encode(found, block)))
        processes().wait()
    stored = {}
    for site in sites:
        tensors = {k.removeprefix(STORED): t for k, t in artefacts.load(site).items() if k.startswith(STORED)}
        if tensors:
            stored[site.name] = plan.specs[site.name], tensors
    return stored


def _with_gradients(
    opened: Opened, inputs: dict[str, InputStatistics], first: Artefacts | None, sites: list[Site]
) -> dict[str, InputStatistics]:
    """Statistics per site, where the first pass kept gradients: those of its group's inputs with these."""
    kept = {} if first is None else {site.name: first.load(site, ("gradients",)) for site in sites}
    device = opened.walker.device
    gradients = {name: split(tensors["gradients"].double(), device)[0] for name, tensors in kept.items() if tensors}
    return with_gradients(inputs, gradients, sites) if gradients else inputs


@torch.no_grad()
def _run_compressed(
    opened: Opened,
    plan: Plan,
    block: int,
    module: nn.Module,
    encoded: Found,
    walk: HiddenWalk,
    tick: Callable[[], None],
) -> None:
    """The calibration samples through the block as it will be stored; `encoded` are this process's sites."""
    walker = opened.walker
    tensors = processes().exchange(encoded)
    before = walk.calibration(block)
    blame = ", compressed,", "ask for less compression, or propagation=one_pass"

    with installed(opened, {name: (plan.specs[name], stored) for name, stored in tensors.items()}):
        with disk_errors(walk.folder), walk.calibration(block + 1).replaced() as after:
            for sample in range(len(before)):
                run_sample(walker, block, module, before, after, sample, blame)
                tick()


def _kept(found: Found, encoded: Found) -> Found:
    """What is left to know of a block: its errors, and its stored tensors, which need not be made a second time."""
    return {
        name: {key: t for key, t in artefact.items() if key in SUMMARY}
        | {STORED + key: t for key, t in encoded.get(name, {}).items()}
        for name, artefact in found.items()
    }
