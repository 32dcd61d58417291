"""Weights of one kind in neighbouring blocks that share a part of what is stored, and get one level together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompress.formats import spec_bytes
from lrcompress.methods import Method
from lrcompress.protocols import Curve, Site, Spec


def sharing(
    method: Method, sites: Sequence[Site], blocks: int, joins: Sequence[Sequence[str]] = ()
) -> list[list[Site]]:
    """`sites` by who shares, the owner first: equal kinds and shapes of `method.group` blocks; those outside, alone.

    `joins` are names of weights that share besides.
    """
    named = {site.name: site for site in sites}
    found: dict[object, list[Site]] = {names[0]: [named[name] for name in names] for names in joins}
    joined = {name for names in joins for name in names}
    for site in sites:
        if site.name in joined:
            continue
        apart = method.group == 1 or site.block >= blocks
        key = site.name if apart else (site.block // method.group, site.kind, site.shape)
        found.setdefault(key, []).append(site)
    return list(found.values())


def joint_specs(method: Method, sites: Sequence[Site], rank: int, element_size: int) -> list[Spec]:
    """How weights that share are stored at a level."""
    if len(sites) == 1 and method.group == 1:
        return [method.spec(sites[0], rank, element_size)]
    owner, *others = sites
    own = [method.joint_spec(site, rank, element_size) for site in others]
    return [method.owner_spec(owner, rank, element_size), *(spec.following(owner.name) for spec in own)]


def joint_curve(method: Method, sites: Sequence[Site], element_size: int) -> Curve:
    """One curve, under the owner's name, for weights that share: their bytes added up.

    Levels that cost no less than the weights as they lie are left out.
    """
    curve = method.curve_of(sites[0], element_size)
    dense = sum(site.dense_bytes(element_size) for site in sites)
    if method.group == 1 and len(sites) == 1:
        if dense == curve.dense_bytes or sites[0].stored is not None:
            return curve
        below = int((curve.bytes[:-1] < dense).sum())
        ranks, costs = curve.ranks[:below].tolist(), curve.bytes[:below].tolist()
        return Curve(curve.name, torch.tensor([*ranks, int(curve.ranks[-1])]), torch.tensor([*costs, dense]), dense)
    ranks, costs = [], []
    for rank in curve.ranks[:-1].tolist():
        cost = sum(spec_bytes(spec, element_size) for spec in joint_specs(method, sites, rank, element_size))
        if cost >= dense:
            break
        ranks.append(rank)
        costs.append(cost)
    ranks, costs = [*ranks, int(curve.ranks[-1])], [*costs, dense]
    return Curve(curve.name, torch.tensor(ranks), torch.tensor(costs), dense)


def levels_of(errors: Tensor, curve: Curve) -> Tensor:
    """A weight's errors at the levels of a joint curve, which are the first ones of its own, and dense."""
    return torch.cat([errors[: len(curve.ranks) - 1], errors[-1:]])
