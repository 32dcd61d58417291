"""Walking the dense model: statistics and an untruncated decomposition per weight, kept in scratch files."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.calibration.collect import collect_outside, token_weights, walk_block
from lrcompress.calibration.hidden import HiddenStates
from lrcompress.checkpoint.writer import disk_errors, write_tensors
from lrcompress.errors import InputError
from lrcompress.model.device import decomposition_device
from lrcompress.protocols import InputStatistics, Site
from lrcompress.report.progress import Reporter
from lrcompress.stages.prepare import Opened

SUMMARY = ("errors", "total", "spectrum")


class Artefacts:
    """Decompositions by block in `folder`; a block's file appears whole, after its outgoing hidden states."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, block: int) -> Path:
        """File of a block."""
        return self.folder / f"block-{block:05d}.safetensors"

    def done(self, block: int) -> bool:
        """Whether the block is finished."""
        return self.path(block).exists()

    def leading(self, blocks: int) -> int:
        """How many blocks are finished without a gap."""
        return next((block for block in range(blocks) if not self.done(block)), blocks)

    def save(self, block: int, artefacts: dict[str, dict[str, Tensor]]) -> None:
        """Write one block's artefacts: site name to tensors."""
        flat = {f"{site}|{key}": t for site, part in artefacts.items() for key, t in part.items()}
        write_tensors(self.path(block), flat)

    def load(self, site: Site, *, summary: bool = False) -> dict[str, Tensor]:
        """A site's artefact, or only the small tensors that allocation needs."""
        from safetensors import safe_open

        with safe_open(self.path(site.block), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(site.name + "|")]
            keys = {name: name.rpartition("|")[2] for name in names}
            return {key: file.get_tensor(name).clone() for name, key in keys.items() if not summary or key in SUMMARY}


Compensate = Callable[[int, nn.Module, dict[str, dict[str, Tensor]], HiddenStates, HiddenStates], None]
"""(block, its loaded module, its artefacts, states that enter it, states that leave it: rewritten in place)."""


def profile(opened: Opened, scratch: Path, reporter: Reporter, compensate: Compensate | None = None) -> Artefacts:
    """Decompose every site, block by block; finished blocks are skipped.

    With `compensate` the calibration samples go on as the compressed block gives them, the held-out ones stay dense.
    """
    artefacts = Artefacts(scratch / "artefacts")
    blocks = len(opened.blocks)
    walk = HiddenWalk(opened, scratch / "hidden")
    first = walk.start(artefacts.leading(blocks))
    with reporter.phase("calibrate and decompose", blocks * len(walk)) as tick:
        for block in range(blocks):
            if block < first:
                for _ in range(len(walk)):
                    tick()
                continue
            with opened.walker.block(block) as module:
                with reporter.timed("calibrate"):
                    statistics = walk.step(block, module, opened.sites_of(block), tick)
                found = decompose_block(opened, block, statistics, reporter)
                if compensate is not None:
                    with reporter.timed("calibrate"):
                        compensate(block, module, found, walk.calibration(block), walk.calibration(block + 1))
                artefacts.save(block, found)
            walk.drop(block - 1)
    outside = opened.sites_of(blocks)
    if outside:
        assert opened.calibration is not None
        ids = opened.calibration.ids
        statistics = collect_outside(opened.walker, ids, walk.calibration(blocks), outside, walk.weights)
        artefacts.save(blocks, decompose_block(opened, blocks, statistics, reporter))
    return artefacts


class HiddenWalk:
    """The dense hidden states of the calibration and held-out samples, in a file a block."""

    def __init__(self, opened: Opened, folder: Path) -> None:
        assert opened.calibration is not None
        folder.mkdir(parents=True, exist_ok=True)
        self._opened, self._folder = opened, folder
        self._ids = torch.cat([opened.calibration.ids, opened.calibration.held_out])
        self.calibrated = len(opened.calibration.ids)
        self.weights = token_weights(self._ids.shape[1], opened.request.method.options.sink_share)
        with torch.no_grad():
            self._width = opened.walker.embed(self._ids[0]).shape[-1]

    def __len__(self) -> int:
        return len(self._ids)

    def start(self, finished: int) -> int:
        """The block to continue at when `finished` blocks are done; 0, freshly embedded, where its input is gone."""
        if finished and self.path(finished).exists():
            return finished
        self._embed()
        return 0

    def calibration(self, block: int) -> HiddenStates:
        """The calibration samples' hidden states that enter `block`."""
        return self._file(self.path(block), self.calibrated)

    def held_out(self, block: int) -> list[Tensor]:
        """The held-out samples' hidden states that enter `block`."""
        states = self._file(self.path(block), len(self))
        return [states.read(i) for i in range(self.calibrated, len(self))]

    def step(
        self, block: int, module: nn.Module, sites: list[Site], tick: Callable[[], None]
    ) -> dict[str, InputStatistics]:
        """Run `block`, loaded as `module`, on every sample; statistics of the calibration samples only."""
        temporary = self.path(block + 1).with_suffix(".tmp")
        before, after = self._file(self.path(block), len(self)), self._file(temporary, len(self))
        with disk_errors(self._folder):
            statistics = walk_block(
                self._opened.walker, block, module, before, after, sites, tick, self.calibrated, self.weights
            )
            os.replace(temporary, self.path(block + 1))
        return statistics

    def gradient_path(self, block: int) -> Path:
        """File of the loss's gradients with respect to the hidden states that enter `block`."""
        return self._folder / f"gradient-{block:05d}.bin"

    def gradients(self, path: Path) -> HiddenStates:
        """Gradients of the calibration samples in file `path`."""
        return self._file(path, self.calibrated)

    def drop(self, block: int, *, keep_last: bool = False) -> None:
        """Forget the hidden states that enter `block`; with `keep_last`, those that leave the last block stay."""
        if not (keep_last and block == len(self._opened.blocks)):
            self.path(block).unlink(missing_ok=True)

    def _embed(self) -> None:
        temporary = self.path(0).with_suffix(".tmp")
        states = self._file(temporary, len(self))
        with torch.no_grad(), disk_errors(self._folder):
            for i in range(len(self)):
                states.write(i, self._opened.walker.embed(self._ids[i]))
            os.replace(temporary, self.path(0))

    def path(self, block: int) -> Path:
        """File of the hidden states that enter `block`."""
        return self._folder / f"dense-{block:05d}.bin"

    def _file(self, path: Path, samples: int) -> HiddenStates:
        return HiddenStates(path, (samples, self._ids.shape[1], self._width), self._opened.walker.dtype)


def decompose_block(
    opened: Opened, block: int, statistics: dict[str, InputStatistics], reporter: Reporter
) -> dict[str, dict[str, Tensor]]:
    """The artefacts of a loaded block's sites; statistics come per site, or per group where those are equal."""
    with reporter.timed("decompose"):
        return {
            s.name: decompose_site(opened, s, statistics.get(s.name, statistics.get(s.group)))
            for s in opened.sites_of(block)
        }


def decompose_site(opened: Opened, site: Site, statistics: InputStatistics | None) -> dict[str, Tensor]:
    """The method's artefact of one site whose block is loaded, with what allocation needs beside it."""
    method, allocator = opened.request.method, opened.request.allocator
    layer = opened.walker.model.get_submodule(site.name)
    weight: Tensor = layer.weight.detach().to(decomposition_device(opened.walker.device))  # type: ignore[operator,union-attr,assignment]
    weight = weight.T if site.conv1d else weight
    if method.needs_statistics and (statistics is None or statistics.count == 0):
        raise InputError(f"no calibration token reached {site.name}: use more text, or leave it out with --ignore")
    try:
        artefact = method.decompose(site, weight, statistics)
        curve = method.curve(site, opened.dtype.itemsize)
        artefact["errors"] = method.errors(artefact, curve)
        artefact["total"] = torch.tensor(method.total(artefact), dtype=torch.float64)
        if allocator.needs_spectrum:
            artefact["spectrum"] = torch.linalg.svdvals(weight.double())
    except ArithmeticError as error:
        raise InputError(f"{site.name}: {error}") from error
    return artefact
