"""Walking the dense model: statistics and an untruncated decomposition per weight, kept in scratch files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.calibration.collect import collect_outside, token_weights, walk_block
from lrcompress.calibration.hidden import HiddenStates
from lrcompress.checkpoint.writer import disk_errors, write_tensors
from lrcompress.errors import InputError
from lrcompress.model.samples import Sample
from lrcompress.parallel.processes import processes
from lrcompress.protocols import InputStatistics, Site
from lrcompress.report.progress import Reporter
from lrcompress.stages.decompose import Found, decompose_block
from lrcompress.stages.kept import KeptStatistics
from lrcompress.stages.opened import Opened
from lrcompress.stages.phases import CALIBRATE, PROFILE
from lrcompress.stages.vocabulary import embedding_statistics, heads_of

SUMMARY = ("errors", "total", "spectrum")
"""What allocation needs of an artefact."""

STORED = "stored."
"""Prefix of an artefact's tensors that are encoded already, as sequential propagation leaves them."""


class Artefacts:
    """Decompositions by block in `folder`; a block's file appears whole, after its outgoing hidden states.

    Every process writes a file of its own weights, and reads all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def paths(self, block: int) -> list[Path]:
        """The files of a block, one a process."""
        team = processes()
        of = [""] if team.size == 1 else [f"-{rank + 1}-of-{team.size}" for rank in range(team.size)]
        return [self.folder / f"block-{block:05d}{part}.safetensors" for part in of]

    def done(self, block: int) -> bool:
        """Whether the block is finished."""
        return all(path.exists() for path in self.paths(block))

    def complete(self, sites: Sequence[Site]) -> bool:
        """Whether nothing is left to do for `sites`."""
        return all(self.done(block) for block in {site.block for site in sites})

    def leading(self, blocks: int) -> int:
        """How many blocks are finished without a gap."""
        return next((block for block in range(blocks) if not self.done(block)), blocks)

    @property
    def sensitivity_path(self) -> Path:
        """File of what stages/sensitivity.py measures."""
        return self.folder / "sensitivity.json"

    @property
    def sensitivities(self) -> dict[str, float] | None:
        """Divergence per unit of squared error, by site, None where it has not been measured."""
        path = self.sensitivity_path
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, block: int, artefacts: Found) -> None:
        """Write one block's artefacts: site name to tensors."""
        flat = {f"{site}|{key}": t for site, part in artefacts.items() for key, t in part.items()}
        write_tensors(self.paths(block)[processes().rank], flat)

    def load(self, site: Site, only: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A site's artefact, or only the named tensors of it, such as SUMMARY."""
        from safetensors import SafetensorError, safe_open

        for path in self.paths(site.block):
            try:
                with safe_open(path, framework="pt") as file:
                    names = [name for name in file.keys() if name.startswith(site.name + "|")]
                    keys = {name: name.rpartition("|")[2] for name in names}
                    wanted = {name: key for name, key in keys.items() if only is None or key in only}
                    if names:
                        return {key: file.get_tensor(name).clone() for name, key in wanted.items()}
            except SafetensorError as error:
                raise InputError(f"{path} is damaged ({error}): run without --resume to start afresh") from error
        raise ValueError(f"{site.name} has not been decomposed")


def profile(opened: Opened, scratch: Path, reporter: Reporter) -> Artefacts:
    """Decompose every site on the dense model's own inputs, block by block; finished blocks are skipped."""
    artefacts = Artefacts(scratch / "artefacts")
    blocks = len(opened.blocks)
    outside = opened.sites_of(blocks)
    if artefacts.complete(opened.sites):
        return artefacts
    kept = KeptStatistics(opened)
    known = bool(processes().least(kept.complete()))
    reporter.expect_no(*(PROFILE if known else ()))
    walk = HiddenWalk(opened, scratch / "hidden", calibrate=not known)
    first = walk.start(artefacts.leading(blocks))
    with reporter.phase(CALIBRATE, blocks * len(walk)) as tick:
        for block in range(blocks):
            if block < first:
                tick.skip(len(walk))
                continue
            with opened.walker.block(block) as module:
                with reporter.timed("calibrate"):
                    statistics = walk.step(block, module, opened.sites_of(block), tick)
                    if known:
                        statistics = kept.load(block)
                    else:
                        kept.save(block, statistics)
                artefacts.save(block, decompose_block(opened, block, statistics, reporter))
            walk.drop(block - 1)
    if outside or opened.embeddings:
        _profile_outside(opened, walk, kept if known else None, kept, artefacts, reporter)
    return artefacts


def _profile_outside(
    opened: Opened,
    walk: "HiddenWalk",
    known: KeptStatistics | None,
    kept: KeptStatistics,
    artefacts: Artefacts,
    reporter: Reporter,
) -> None:
    """The sites outside of the blocks, and the embeddings, from `known` statistics where there are some."""
    blocks, heads = len(opened.blocks), heads_of(opened.embeddings)
    sites = {blocks: opened.sites_of(blocks), blocks + 1: opened.embeddings}
    if known is not None:
        found = {block: known.load(block) for block, own in sites.items() if own}
    elif opened.request.method.needs_statistics:
        last, gathered = walk.calibration(blocks), [*sites[blocks], *heads]
        inputs = collect_outside(opened.walker, walk.samples, last, gathered, walk.weights) if gathered else {}
        found = {blocks: inputs, blocks + 1: embedding_statistics(opened, inputs, walk.samples, None)}
    else:
        found = {block: {} for block in sites}
    for block, own in sites.items():
        if own:
            kept.save(block, found[block])
            artefacts.save(block, decompose_block(opened, block, found[block], reporter))


class HiddenWalk:
    """The hidden states of calibration and held-out samples, a file of each a block, whose names begin with `stem`.

    Of several processes each has its own calibration `samples`, the first one the held-out ones too. Without
    `calibrate` only held-out samples are walked, without `hold_out` only calibration samples: a file that is there
    holds all samples of its kind.
    """

    def __init__(
        self, opened: Opened, folder: Path, stem: str = "dense", *, calibrate: bool = True, hold_out: bool = True
    ) -> None:
        assert opened.calibration is not None
        team, every = processes(), opened.calibration
        folder = folder if team.first else folder.with_name(f"{folder.name}-{team.rank + 1}")
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._opened, self.folder, self._stem = opened, folder, stem
        opened.walker.looks.folder = folder
        self.numbers = team.samples(len(every.samples))
        self.samples = [every.samples[number] for number in self.numbers]
        self.calibrated = len(self.samples)
        self._held_out = every.unseen if team.first else []
        wanted = [(self.samples, self.calibration, calibrate), (self._held_out, self._held, hold_out)]
        self._walked = [(samples, states) for samples, states, walked in wanted if walked and samples]
        self.weights = token_weights(every.length, opened.request.method.options.sink_share)
        samples = [*every.samples, *every.unseen]  # none of a model that cannot be walked
        with torch.no_grad():
            width = opened.walker.embed(samples[0]).shape[-1] if samples else 0
        self._sample = (every.length, width)

    def __len__(self) -> int:
        """Samples that are walked."""
        return sum(len(samples) for samples, _ in self._walked)

    def there(self, block: int) -> bool:
        """Whether all of this process's samples that are walked have come to `block`."""
        return all(states(block).whole() for _, states in self._walked)

    def start(self, finished: int) -> int:
        """The block to continue at when `finished` blocks are done; 0, freshly embedded, where its input is gone."""
        if processes().least(finished if self.there(finished) else 0):
            return finished
        with torch.no_grad(), disk_errors(self.folder):
            for samples, states in self._walked:
                with states(0).replaced() as new:
                    for i, sample in enumerate(samples):
                        new.write(i, self._opened.walker.embed(sample))
        return 0

    def calibration(self, block: int) -> HiddenStates:
        """The calibration samples' hidden states that enter `block`."""
        return self._file(self.folder / f"{self._stem}-{block:05d}.bin", self.samples)

    def held_out(self, block: int) -> list[Tensor]:
        """The held-out samples' hidden states that enter `block`."""
        return [self._held(block).read(i) for i in range(len(self._held_out))]

    def held_out_path(self, block: int) -> Path:
        """File of the held-out samples' hidden states that enter `block`."""
        return self._held(block).path

    def step(
        self, block: int, module: nn.Module, sites: list[Site], tick: Callable[[], None]
    ) -> dict[str, InputStatistics]:
        """Run `block`, loaded as `module`, on every sample that is walked; statistics of the calibration samples."""
        statistics: dict[str, InputStatistics] = {}
        with disk_errors(self.folder):
            for samples, states in self._walked:
                counted = sites if samples is self.samples else []
                with states(block + 1).replaced() as new:
                    statistics |= walk_block(
                        self._opened.walker, block, module, states(block), new, counted, tick, self.weights
                    )
        return statistics

    def gradient_path(self, block: int) -> Path:
        """File of the loss's gradients with respect to the hidden states that enter `block`."""
        return self.folder / f"gradient-{block:05d}.bin"

    def gradients(self, path: Path) -> HiddenStates:
        """Gradients of the calibration samples in file `path`."""
        return self._file(path, self.samples)

    def drop(self, block: int, *, keep_last: bool = False) -> None:
        """Forget the hidden states that enter `block`; with `keep_last`, those that leave the last block stay."""
        if not (keep_last and block == len(self._opened.blocks)):
            for states in (self.calibration(block), self._held(block)):
                states.path.unlink(missing_ok=True)

    def _held(self, block: int) -> HiddenStates:
        return self._file(self.folder / f"{self._stem}-held-out-{block:05d}.bin", self._held_out)

    def _file(self, path: Path, samples: Sequence[Sample]) -> HiddenStates:
        return HiddenStates(path, (len(samples), *self._sample), self._opened.walker.dtype, samples)
