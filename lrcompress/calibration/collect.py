"""Gathering input statistics while a block runs."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lrcompress.calibration.hidden import HiddenStates
from lrcompress.calibration.routing import Routes
from lrcompress.errors import NumericalError
from lrcompress.finite import all_finite
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.samples import Sample, sample_of
from lrcompress.parallel.processes import processes
from lrcompress.precision import exact, split
from lrcompress.protocols import InputStatistics, Site


def token_weights(length: int, sink_share: float) -> Tensor | None:
    """(length,) weight of every token of a block: the first one gets `sink_share` of the whole, the others count once.

    Every later token attends to the first (the attention sink), so its error is multiplied by the block's length
    while it is one row of many. None where all count once.
    """
    if sink_share <= 0 or length < 2:
        return None
    weights = torch.ones(length)
    weights[0] = max(1.0, sink_share / (1 - sink_share) * (length - 1))
    return weights


def shortened(weights: Tensor | None, length: int) -> Tensor | None:
    """The `weights` of a block's tokens for a shorter sample: its first token's share of the whole is the same."""
    if weights is None or len(weights) == length:
        return weights
    found = weights[:length].clone()
    found[0] = max(1.0, float(weights[0]) * (length - 1) / (len(weights) - 1))
    return found


class InputCollector:
    """Context manager: while open, every call of a site's layer adds its input rows, once per group, or its outputs.

    `dense` may hold, by group, the rows that the dense model gives for the next call; see InputStatistics.drift.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], weights: Tensor | None) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self.dense: dict[str, Recorded] = {}
        self._model, self._sites, self._weights, self._whole = model, sites, weights, weights
        self._routes = Routes(model, [site.name for site in sites])
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def weigh(self, length: int) -> None:
        """From now on samples have so many tokens, which may be fewer than there are weights."""
        self._weights = shortened(self._whole, length)

    def __enter__(self) -> "InputCollector":
        self._routes.listen()
        for site in self._sites:
            if site.group == site.name:
                layer = self._model.get_submodule(site.name)
                if site.by_outputs:
                    self._handles.append(layer.register_forward_hook(self._output_hook(site)))
                else:
                    self._handles.append(layer.register_forward_pre_hook(self._hook(site)))
        return self

    def __exit__(self, *_: object) -> None:
        self._routes.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def summed(self, device: torch.device) -> dict[str, InputStatistics]:
        """The statistics of all processes together; of this one alone where there are no others."""
        team = processes()
        if team.size == 1 or not self._sites:
            return self.statistics
        drifts = any(team.gather(any(one.drift is not None for one in self.statistics.values())))
        found = {}
        for site in self._sites:
            if site.group != site.name:
                continue
            one = self.statistics.get(site.group) or InputStatistics.of(site, device)
            drift = one.drift if one.drift is not None else torch.zeros_like(one.second) if drifts else None
            sums = [split(sum, one.second.device) for sum in (one.total.new_tensor([one.count, one.rows]), one.total)]
            parts = (*itertools.chain.from_iterable(sums), one.second, one.rest, drift)
            team.add_up([part for part in parts if part is not None])
            counts, total = (exact(*parts) for parts in sums)
            if counts[1] > 0:
                found[site.group] = replace(one, count=float(counts[0]), rows=int(counts[1]), total=total, drift=drift)
        return found

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows, tokens = args[0].detach().flatten(0, -2), self._routes.tokens(site.name)
            weights = self._weights_on(rows.device) if tokens is not None else self._weights_for(args[0])
            if weights is not None and tokens is not None:
                weights = weights[tokens]
            dense = self.dense.pop(site.group, None)
            counterparts = None if dense is None else dense.beside(rows, tokens)
            self._of(site, rows.device).update(rows, weights, counterparts)

        return hook

    def _output_hook(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            bias = getattr(module, "bias", None)
            outputs = output.detach() if bias is None else output.detach() - bias.detach()
            self._of(site, output.device).update(args[0], self._weights_for(args[0]), outputs=outputs)

        return hook

    def _of(self, site: Site, device: torch.device) -> InputStatistics:
        if site.group not in self.statistics:
            self.statistics[site.group] = InputStatistics.of(site, device)
        return self.statistics[site.group]

    def _weights_for(self, x: Tensor) -> Tensor | None:
        """Of the rows of a layer's input x: its token's for each; None where rows are no tokens in order."""
        weights = self._weights_on(x.device)
        if weights is None or x.shape[:-1].numel() == len(weights):
            return weights
        if x.dim() > 3 and x.shape[:2] == (1, len(weights)):
            return weights.repeat_interleave(x.shape[2:-1].numel())
        return None

    def _weights_on(self, device: torch.device) -> Tensor | None:
        return None if self._weights is None else self._weights.to(device)


@dataclass
class Recorded:
    """Input rows (rows, in) of a layer and, for an expert's, the tokens (rows,) that they belong to."""

    rows: Tensor
    tokens: Tensor | None

    def beside(self, rows: Tensor, tokens: Tensor | None) -> Tensor:
        """The recorded row of the same token for each of `rows`; the row itself where its token was sent elsewhere."""
        if tokens is None or self.tokens is None:
            return self.rows
        found = rows.clone()
        mine, recorded = torch.where(tokens[:, None] == self.tokens)
        found[mine] = self.rows[recorded]
        return found


class InputRecorder:
    """Context manager: while open, `last` holds the last input of every group of sites."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.last: dict[str, Recorded] = {}
        self._model, self._sites = model, sites
        self._routes = Routes(model, [site.name for site in sites])
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "InputRecorder":
        self._routes.listen()
        for site in self._sites:
            if site.group == site.name:
                layer = self._model.get_submodule(site.name)
                self._handles.append(layer.register_forward_pre_hook(self._hook(site)))
        return self

    def __exit__(self, *_: object) -> None:
        self._routes.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.last[site.group] = Recorded(args[0].detach().flatten(0, -2), self._routes.tokens(site.name))

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
    weights: Tensor | None,
) -> dict[str, InputStatistics]:
    """Run every sample through block `index`, loaded as `module`, from file to file.

    Returns the input statistics per group of `sites`, tokens counted by `weights`.
    """
    with InputCollector(walker.model, sites, weights) as collector:
        for sample in range(len(before)):
            collector.weigh(before.length(sample))
            run_sample(walker, index, module, before, after, sample)
            tick()
    return collector.summed(walker.device)


def run_sample(
    walker: BlockWalker,
    index: int,
    module: nn.Module,
    before: HiddenStates,
    after: HiddenStates,
    sample: int,
    blame: tuple[str, str] = ("", "the checkpoint is damaged or overflows in this dtype"),
) -> None:
    """One sample through block `index`, from file to file; `blame` says what block and why if it is not finite."""
    state = before.read(sample).to(walker.device, walker.dtype)
    hidden = walker.run(index, module, state, before.sample(sample))
    if not all_finite(hidden):
        what, cure = blame
        raise NumericalError(
            f"{walker.blocks[index]}{what} puts out non-finite numbers on calibration sample {sample}: {cure}"
        )
    after.write(sample, hidden)


@torch.no_grad()
def collect_beside_dense(
    walker: BlockWalker,
    index: int,
    module: nn.Module,
    hidden: HiddenStates,
    dense: HiddenStates | None,
    sites: Sequence[Site],
    weights: Tensor | None,
) -> dict[str, InputStatistics]:
    """Input statistics per group of `sites` in block `index` on `hidden`, with the drift from `dense` where given."""
    collector, recorder = InputCollector(walker.model, sites, weights), InputRecorder(walker.model, sites)
    for sample in range(len(hidden)):
        if dense is not None:
            with recorder:
                walker.run(index, module, dense.read(sample).to(walker.device, walker.dtype), dense.sample(sample))
            collector.dense, recorder.last = recorder.last, {}
        collector.weigh(hidden.length(sample))
        with collector:
            walker.run(index, module, hidden.read(sample).to(walker.device, walker.dtype), hidden.sample(sample))
    return collector.summed(walker.device)


@torch.no_grad()
def collect_outside(
    walker: BlockWalker,
    ids: Tensor | Sequence[Sample],
    last: HiddenStates,
    sites: Sequence[Site],
    weights: Tensor | None,
) -> dict[str, InputStatistics]:
    """Input statistics of sites outside the blocks (the output head): the model's end run on the last hidden states."""
    with InputCollector(walker.model, sites, weights) as collector:
        for sample in range(len(last)):
            tokens = sample_of(ids[sample]).words
            collector.weigh(len(tokens))
            walker.logits(tokens, last.read(sample).to(walker.device, walker.dtype))
    return collector.summed(walker.device)
