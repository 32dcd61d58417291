"""Statistics of experts: each one's come from the tokens that are routed to it, and some get few."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrcompress.grams import no_rest
from lrcompress.model.experts import experts_of, linear_experts
from lrcompress.protocols import InputStatistics, Site

LEAST_SHARE = 0.1
"""An expert's errors count for at least this part of what an evenly used one's would."""


class Routes:
    """While open (`listen` to `close`), knows which tokens every expert of the running block works on."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = linear_experts(model)
        holders = {name: experts_of(name, modules) for name in names}
        self._holders = {name: holder for name, holder in holders.items() if holder is not None}
        self._modules = {holder: modules[holder] for holder in set(self._holders.values())}
        self._routes: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def listen(self) -> None:
        """Begin."""
        for holder, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(holder)))

    def close(self) -> None:
        """Stop."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._routes.clear()

    def tokens(self, name: str) -> Tensor | None:
        """(rows,) places, in the block, of the tokens that layer `name` is called on; None where those are all."""
        holder = self._holders.get(name)
        if holder is None:
            return None
        index = int(name.removeprefix(holder + ".").split(".")[0])
        return torch.where(self._routes[holder] == index)[0]

    def _hook(self, holder: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._routes[holder] = args[1]

        return hook


def complete(
    sites: Sequence[Site], statistics: dict[str, InputStatistics], experts: Iterable[str], tokens: float
) -> dict[str, InputStatistics]:
    """The statistics of a block, by site or group, with those of its experts as they are used; `tokens` in the block.

    An expert that got r rows for n inputs, r < n, is topped up with n - r rows like those of all experts of its
    layer together; its neurons are its own, so inputs of down_proj become a multiple of the identity as large as the
    others' on average. Likewise the gradients. Every expert gets its share of the tokens, LEAST_SHARE of the average at
    least.
    """
    found = dict(statistics)
    families: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        holder = experts_of(site.name, experts)
        if holder is not None:
            families.setdefault((holder, site.name.rpartition(".")[2]), []).append(site)
    for (_, projection), members in families.items():
        own = {site.name: statistics.get(site.name, statistics.get(site.group)) for site in members}
        pooled = _pooled([one for one in own.values() if one is not None], inner_inputs=projection == "down_proj")
        if pooled is not None:
            least = LEAST_SHARE * pooled.count / len(members)
            for name, one in own.items():
                topped = _topped_up(one, pooled)
                found[name] = replace(topped, share=max(one.count if one is not None else 0.0, least) / tokens)
    return found


def _pooled(known: Sequence[InputStatistics], *, inner_inputs: bool) -> InputStatistics | None:
    """All experts' statistics together; what is about their own neurons as a multiple of the identity."""
    if not known:
        return None
    pooled = InputStatistics.zeros(len(known[0].total), known[0].total.device)
    for one in known:
        pooled.merge(one)
    pooled.drift = None
    if inner_inputs:
        pooled.second, pooled.total = _even(pooled.second), torch.zeros_like(pooled.total)
        pooled.rest = no_rest(pooled.second)
    if known[0].gradients is not None:
        gradients = sum(
            (one.rows * one.gradients for one in known if one.gradients is not None), start=torch.tensor(0.0)
        )
        gradients = gradients / sum(one.rows for one in known)
        pooled.gradients = gradients if inner_inputs else _even(gradients)
    return pooled


def _even(moment: Tensor) -> Tensor:
    """A matrix, or its diagonal, of the same trace with equal variances."""
    if moment.dim() == 1:
        return moment.mean().expand_as(moment).clone()
    return moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _topped_up(own: InputStatistics | None, pooled: InputStatistics) -> InputStatistics:
    """`own` with as many average rows of `pooled` as it lacks to have one for every input, and every output."""
    inputs = len(pooled.total)
    own = own or InputStatistics.zeros(inputs, pooled.total.device)
    lacking = max(0, inputs - own.rows)
    if lacking:
        own = replace(
            own,
            count=own.count + lacking,
            total=own.total + lacking * pooled.mean(),
            second=own.second + lacking * pooled.gram(),
        )
    if pooled.gradients is not None:
        lacking = max(0, len(pooled.gradients) - own.rows)
        mine = 0.0 if own.gradients is None else own.rows * own.gradients
        own = replace(own, gradients=(mine + lacking * pooled.gradients) / (own.rows + lacking))
    return own
