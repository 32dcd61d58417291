"""What the levels of a weight cost in the measure that a ratio counts: stored bytes, multiply-adds or ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrcompress.budget import Measure
from lrcompress.formats import spec_multiplies
from lrcompress.methods import Method
from lrcompress.protocols import Curve, Site
from lrcompress.stages.sharing import joint_curve, joint_specs, sharing


@dataclass(frozen=True)
class Costs:
    """A curve of stored bytes, and the same choices priced as asked: what an allocator is given.

    A level that costs no less than a higher one, such as the dense weight, is no choice: `levels` (n,) are those of
    `stored` that `asked` has, in whose `bytes` the cost stands.
    """

    sites: list[Site]
    stored: Curve
    asked: Curve
    levels: Tensor

    def priced(self, stored: Curve) -> Curve:
        """`asked` with the errors and the spectrum of `stored`."""
        errors = None if stored.errors is None else stored.errors[self.levels]
        return replace(self.asked, errors=errors, spectrum=stored.spectrum)


def costs(
    method: Method,
    sites: Sequence[Site],
    blocks: int,
    element_size: int,
    of: Measure,
    joins: Sequence[Sequence[str]] = (),
) -> list[Costs]:
    """One entry per curve; weights that share, such as those that `joins` names, have one together."""
    found, known, every = [], dict[object, Tensor](), torch.arange(0)
    for group in sharing(method, sites, blocks, joins):
        curve = joint_curve(method, group, element_size)
        if of == "bytes":
            every = every if len(every) >= len(curve.ranks) else torch.arange(len(curve.ranks))
            found.append(Costs(group, curve, curve, every[: len(curve.ranks)]))
            continue
        # Finding a spec takes as long as the rank is high; equal weights have equal ones.
        key = [(site.shape, site.bias, site.name if method.levels_by_name else None) for site in group]
        price = known.get(tuple(key))
        if price is None:
            price = known[tuple(key)] = _prices(method, group, curve, element_size, of)
        later = torch.cat([price.flip(0).cummin(0).values.flip(0)[1:], price[-1:] + 1])
        levels = (price < later).nonzero()[:, 0]
        asked = Curve(curve.name, curve.ranks[levels], price[levels], int(price[-1]))
        found.append(Costs(group, curve, asked, levels))
    return found


def _prices(method: Method, sites: list[Site], curve: Curve, element_size: int, of: Measure) -> Tensor:
    """(levels,) int64: the cost of every level of a curve, the dense one last."""
    prices = []
    for rank in curve.ranks[:-1].tolist():
        if of == "rank":
            prices.append(rank * len(sites))
        else:
            prices.append(sum(spec_multiplies(spec) for spec in joint_specs(method, sites, rank, element_size)))
    dense = (min(site.shape) if of == "rank" else site.shape[0] * site.shape[1] for site in sites)
    return torch.tensor([*prices, sum(dense)])
