"""The inputs that an adapter's modules get while the base model, with the adapter on it, reads calibration text."""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lrcompress.calibration.collect import collect_outside
from lrcompress.errors import InputError
from lrcompress.foreign.adapter import Adapter
from lrcompress.protocols import Site, TensorSource
from lrcompress.recipe import CalibrationSpec, make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages.calibrate import calibrate_model
from lrcompress.stages.opened import Opened
from lrcompress.stages.opening import open_targets
from lrcompress.stages.profile import HiddenWalk
from lrcompress.stages.request import check_request


@dataclass(frozen=True)
class Inputs:
    """Whose inputs errors are weighed by: `base` is the model that the adapter was trained on."""

    base: str
    calibration: list[CalibrationSpec]
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False


class Adapted:
    """A checkpoint's tensors with the updates of an adapter's linear layers added; see protocols.TensorSource."""

    def __init__(self, source: TensorSource, adapter: Adapter, sites: dict[str, Site]) -> None:
        self._source, self._adapter, self._sites = source, adapter, sites

    def names(self) -> list[str]:
        """See TensorSource."""
        return self._source.names()

    def made(self) -> Collection[str]:
        """See TensorSource."""
        return self._source.made()

    def meta(self, name: str) -> Tensor:
        """See TensorSource."""
        return self._source.meta(name)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """See TensorSource."""
        for name, tensor in self._source.read(names):
            site = self._sites.get(name)
            if site is None:
                yield name, tensor
            else:
                left, right = self._adapter.factors(site.name)
                update = left @ right
                yield name, (tensor.double() + (update.T if site.conv1d else update)).to(tensor.dtype)

    def will_read(self, names: Sequence[str]) -> None:
        """See TensorSource."""
        self._source.will_read(names)


def input_grams(adapter: Adapter, inputs: Inputs, reporter: Reporter) -> Iterator[tuple[str, Tensor]]:
    """(module, Gram (in, in) of its inputs, float64), a block of the model after the other."""
    opened = _open(adapter, inputs, reporter)
    blocks = len(opened.blocks)
    with tempfile.TemporaryDirectory(prefix="lrcompress-squeeze-") as folder:
        walk = HiddenWalk(opened, Path(folder), hold_out=False)
        walk.start(0)
        with reporter.phase("calibrate", blocks * len(walk)) as tick:
            for block in range(blocks):
                with opened.walker.block(block) as module:
                    statistics = walk.step(block, module, opened.sites_of(block), tick)
                walk.drop(block)
                for site in opened.sites_of(block):
                    if site.group not in statistics:
                        raise InputError(f"no calibration token reached {site.name}: use more text")
                    yield site.name, statistics[site.group].gram().cpu()
        outside = opened.sites_of(blocks)
        if outside:
            statistics = collect_outside(opened.walker, walk.samples, walk.calibration(blocks), outside, walk.weights)
            for site in outside:
                yield site.name, statistics[site.group].gram().cpu()


def _open(adapter: Adapter, inputs: Inputs, reporter: Reporter) -> Opened:
    """The base with its modules that the adapter updates as sites, its weights read with their updates."""
    recipe = make_recipe({
        "model": inputs.base,
        "method": {"name": "lord", "metric": "input"},
        "ratio": 0.5,  # every recipe asks for one
        "calibration": [spec.model_dump() for spec in inputs.calibration],
        "seed": inputs.seed,
        "device": inputs.device,
        "trust_remote_code": inputs.trust_remote_code,
        "target": list(adapter.linear),
    })  # fmt: skip
    opened = open_targets(check_request(recipe), reporter)
    for site in opened.sites:
        if site.shape != adapter.linear[site.name].shape:
            raise InputError(
                f"adapter {adapter.label} updates {site.name} of shape {adapter.linear[site.name].shape}, --base "
                f"{inputs.base} has {site.shape}: give the model that it was trained on"
            )
    stored = {opened.walker.names[f"{site.name}.weight"]: site for site in opened.sites}
    opened.walker.source = Adapted(opened.reader, adapter, stored)
    calibrate_model(opened, reporter)
    opened.sites = [replace(site, by_outputs=False) for site in opened.sites]  # the updates' inputs, not W's outputs
    return opened
