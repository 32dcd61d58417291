"""Gathering input statistics while a block runs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lrcompress.calibration.hidden import HiddenStates
from lrcompress.errors import InputError
from lrcompress.model.blocks import BlockWalker
from lrcompress.protocols import InputStatistics, Site


class InputCollector:
    """Context manager: while open, every call of a site's layer adds its input rows, once per group."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._model, self._sites = model, sites
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "InputCollector":
        for site in self._sites:
            if site.group == site.name:
                layer = self._model.get_submodule(site.name)
                self._handles.append(layer.register_forward_pre_hook(self._hook(site)))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if site.group not in self.statistics:
                self.statistics[site.group] = InputStatistics.zeros(site.shape[1], args[0].device)
            self.statistics[site.group].update(args[0])

        return hook


@torch.no_grad()
def walk_block(
    walker: BlockWalker,
    index: int,
    module: nn.Module,
    before: HiddenStates,
    after: HiddenStates,
    sites: Sequence[Site],
    tick: Callable[[], None],
    counted: int,
) -> dict[str, InputStatistics]:
    """Run all samples through block `index`, loaded as `module`, from file to file.

    Returns the input statistics per group of `sites` over the first `counted` samples; the others are held out.
    """
    with InputCollector(walker.model, sites) as collector:
        for sample in range(len(before)):
            if sample == counted:
                collector.close()
            hidden = walker.run(index, module, before.read(sample).to(walker.device, walker.dtype))
            if not bool(torch.isfinite(hidden).all()):
                raise InputError(f"{walker.blocks[index]} puts out non-finite numbers on calibration sample {sample}: "
                                 "the checkpoint is damaged or overflows in this dtype")
            after.write(sample, hidden)
            tick()
    return collector.statistics


@torch.no_grad()
def collect_outside(
    walker: BlockWalker, ids: Tensor, last: HiddenStates, sites: Sequence[Site]
) -> dict[str, InputStatistics]:
    """Input statistics of sites outside the blocks (the output head): the model's end run on the last hidden states."""
    with InputCollector(walker.model, sites) as collector:
        for sample in range(len(last)):
            walker.logits(ids[sample], last.read(sample).to(walker.device, walker.dtype))
    return collector.statistics
