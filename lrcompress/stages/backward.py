"""Profiling with gradients: hidden states forward, then statistics and decompositions from the last block back."""

from collections import Counter
from pathlib import Path

from lrcompress.calibration.collect import collect_outside
from lrcompress.calibration.gradients import backward_block, loss_gradients, with_gradients
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.parallel.processes import processes
from lrcompress.protocols import InputStatistics
from lrcompress.report.progress import Reporter, Steps
from lrcompress.stages.decompose import UNREACHED, decompose_block
from lrcompress.stages.kept import KeptStatistics
from lrcompress.stages.opened import Opened
from lrcompress.stages.phases import BACKWARD, DECOMPOSE, FORWARD, PROFILE
from lrcompress.stages.profile import Artefacts, HiddenWalk
from lrcompress.stages.vocabulary import embedding_statistics, heads_of, keep_heads, kept_heads

NAMED = 12
"""Layers that a warning names one by one."""


def profile_backward(opened: Opened, scratch: Path, reporter: Reporter) -> Artefacts:
    """As profile.profile, for methods that need gradients; finished blocks are skipped.

    The hidden states that enter every block stay in scratch files until the backward pass has been there.
    """
    artefacts = Artefacts(scratch / "artefacts")
    if artefacts.complete(opened.sites):
        return artefacts
    kept = KeptStatistics(opened)
    blocks, team = len(opened.blocks), processes()
    known = bool(team.least(kept.complete()))
    reporter.expect_no(*(PROFILE if known else ()))
    walk = HiddenWalk(opened, scratch / "hidden", calibrate=not known)
    with reporter.phase(FORWARD, blocks * len(walk)) as tick, reporter.timed("calibrate"):
        _forward(opened, walk, tick)
    if known:
        _decompose_known(opened, kept, artefacts, reporter)
        return artefacts
    done = [artefacts.done(block) for block in range(blocks)]  # the same for all processes, before any goes on
    if not team.least(walk.gradient_path(blocks).exists()):
        with reporter.timed("calibrate"):
            _loss(opened, walk, kept, artefacts, reporter)
    with reporter.phase(BACKWARD, blocks * walk.calibrated) as tick:
        for block in reversed(range(blocks)):
            if done[block]:
                tick.skip(walk.calibrated)
                continue
            with opened.walker.block(block) as module:
                with reporter.timed("calibrate"):
                    temporary = walk.gradient_path(block).with_suffix(".tmp")
                    with disk_errors(scratch):
                        statistics = backward_block(
                            opened.walker,
                            block,
                            module,
                            walk.calibration(block),
                            walk.gradients(walk.gradient_path(block + 1)),
                            walk.gradients(temporary),
                            opened.sites_of(block),
                            walk.weights,
                            tick,
                            gram=opened.request.method.needs_gradient_gram,
                        )
                        temporary.rename(walk.gradient_path(block))
                    kept.save(block, statistics)
                artefacts.save(block, decompose_block(opened, block, statistics, reporter))
            walk.gradient_path(block + 2).unlink(missing_ok=True)
            walk.drop(block + 1, keep_last=True)
    embeddings = blocks + 1
    if opened.embeddings and not artefacts.done(embeddings):
        with reporter.timed("calibrate"):
            heads = kept_heads(walk.folder, heads_of(opened.embeddings), opened.walker.device)
            statistics = embedding_statistics(opened, heads, walk.samples, walk.gradients(walk.gradient_path(0)))
        kept.save(embeddings, statistics)
        artefacts.save(embeddings, decompose_block(opened, embeddings, statistics, reporter))
    return artefacts


def warn_unreached(opened: Opened, artefacts: Artefacts, reporter: Reporter) -> None:
    """Name the layers that the loss has no gradient at, of many their kinds."""
    sites = [site for site in opened.sites if artefacts.load(site, (UNREACHED,))]
    if sites:
        kinds = [f"{kind} of {count} blocks" for kind, count in Counter(site.kind for site in sites).items()]
        names = [site.name for site in sites] if len(sites) <= NAMED else kinds
        reporter.warn(
            f"no gradient of the loss reaches {', '.join(names)}: such a layer, as one that only chooses tokens, is "
            "compressed by its inputs, with its share of its block's error"
        )


def _decompose_known(opened: Opened, kept: KeptStatistics, artefacts: Artefacts, reporter: Reporter) -> None:
    """Every block with the statistics of an earlier run."""
    with reporter.phase(DECOMPOSE, len(opened.blocks)) as tick:
        for block in range(len(opened.blocks)):
            if not artefacts.done(block):
                with opened.walker.block(block):
                    artefacts.save(block, decompose_block(opened, block, kept.load(block), reporter))
            tick()
    for outside in range(len(opened.blocks), len(opened.blocks) + 2):
        if opened.sites_of(outside) and not artefacts.done(outside):
            artefacts.save(outside, decompose_block(opened, outside, kept.load(outside), reporter))


def _forward(opened: Opened, walk: HiddenWalk, tick: Steps) -> None:
    """Hidden states into every block; files that are there are kept."""
    blocks = len(opened.blocks)
    last = processes().least(max((block for block in range(blocks + 1) if walk.there(block)), default=0))
    first = last if last == blocks else walk.start(last)
    tick.skip(first * len(walk))
    for block in range(first, blocks):
        with opened.walker.block(block) as module:
            walk.step(block, module, [], tick)


def _loss(opened: Opened, walk: HiddenWalk, kept: KeptStatistics, artefacts: Artefacts, reporter: Reporter) -> None:
    """The gradient that enters the last block from behind, and the sites outside of the blocks."""
    blocks, outside = len(opened.blocks), opened.sites_of(len(opened.blocks))
    heads = heads_of(opened.embeddings)
    samples, last = walk.samples, walk.calibration(blocks)
    inputs: dict[str, InputStatistics] = {}
    if outside or heads:
        inputs = collect_outside(opened.walker, samples, last, [*outside, *heads], walk.weights)
    temporary = walk.gradient_path(blocks).with_suffix(".tmp")
    with disk_errors(temporary.parent):
        gram = opened.request.method.needs_gradient_gram
        seed = opened.request.recipe.seed if opened.request.method.options.labels == "sampled" else None
        gradients = loss_gradients(
            opened.walker, samples, last, walk.gradients(temporary), [*outside, *heads],
            gram=gram, sample_seed=seed, numbers=walk.numbers,
        )  # fmt: skip
        keep_heads(walk.folder, with_gradients(inputs, gradients, heads), heads)
        if outside:
            statistics = with_gradients(inputs, gradients, outside)
            kept.save(blocks, statistics)
            artefacts.save(blocks, decompose_block(opened, blocks, statistics, reporter))
        temporary.rename(walk.gradient_path(blocks))
