"""Which weights are truncated together: of one input, or equal ones of neighbouring blocks, where that errs less."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.formats.pivoted import Pivoted
from lrcompress.linalg.concatenation import Joint, bounds, estimate
from lrcompress.methods.joining import joined, rounding_loss, weighed
from lrcompress.protocols import Site
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.sharing import joint_curve, joint_specs


@dataclass(frozen=True)
class Join:
    """Weights with one right factor, its owner first; squared errors in the metric, of the best that `bytes` allow.

    errors: of every weight at the levels of their joint curve, by name.
    """

    names: list[str]
    bytes: int
    separate_error: float
    joint_error: float
    errors: dict[str, Tensor]


def find_joins(opened: Opened, artefacts: Artefacts, bytes_: dict[str, int], errors: dict[str, float]) -> list[Join]:
    """The joins that err less than the same weights do apart at no more bytes, the largest gains first, none twice.

    `bytes_` and `errors` are those of every weight apart, by name.
    """
    found = []
    for sites in candidates(opened):
        join = _tried(opened, artefacts, sites, sum(bytes_[s.name] for s in sites), sum(errors[s.name] for s in sites))
        if join is not None:
            found.append(join)
    taken: set[str] = set()
    chosen = []
    for join in sorted(found, key=lambda j: j.joint_error - j.separate_error):
        if taken.isdisjoint(join.names):
            chosen.append(join)
            taken |= set(join.names)
    return chosen


def candidates(opened: Opened) -> Iterator[list[Site]]:
    """Weights of one input, and pairs of one kind and shape in neighbouring blocks; that of most rows first."""
    method, groups = opened.request.method, dict[tuple[int, str], list[Site]]()
    sites = [site for site in opened.sites if method.joins(site)]
    for site in sites:
        groups.setdefault((site.block, site.group), []).append(site)
    for group in groups.values():
        if len(group) > 1:
            yield sorted(group, key=lambda site: -site.shape[0])
    places = {(site.block, site.kind): site for site in sites if site.block < len(opened.blocks)}
    for (block, kind), site in places.items():
        after = places.get((block + 1, kind))
        if after is not None and after.shape == site.shape:
            yield [site, after]


def _tried(opened: Opened, artefacts: Artefacts, sites: Sequence[Site], limit: int, separate: float) -> Join | None:
    method = opened.request.method
    curve = joint_curve(method, sites, opened.dtype.itemsize)
    levels = int((curve.bytes[:-1] <= limit).sum())
    if not levels or separate <= 0:
        return None
    rank = int(curve.ranks[levels - 1])
    energies = [artefacts.load(site, ("energies",))["energies"] for site in sites]
    if bounds(energies, rank)[0][rank] >= separate:
        return None
    found = [artefacts.load(site) for site in sites]
    if len({site.group for site in sites}) == 1:
        rights = weighed(found)
        if estimate(rights, energies, found[0].get("gram"), rank, rank)[0][rank] >= separate:
            return None
    try:
        truncated = joined(found)
    except ArithmeticError:  # Grams too far from positive semidefinite for errors to be known: these stay apart
        return None
    kept = _components(opened, truncated, sites[0], curve.ranks[:-1])
    errors = {
        site.name: torch.cat([own[kept], own.new_zeros(1)]) for site, own in zip(sites, truncated.errors, strict=True)
    }
    error = float(sum(own[levels - 1] for own in errors.values()))
    if error >= separate:
        return None
    loss = rounding_loss(joint_specs(method, sites, rank, opened.dtype.itemsize), found, truncated, opened.dtype)
    if error * loss >= separate:
        return None
    errors = {name: own * loss for name, own in errors.items()}
    return Join([site.name for site in sites], int(curve.bytes[levels - 1]), separate, error * loss, errors)


def _components(opened: Opened, truncated: Joint, owner: Site, ranks: Tensor) -> Tensor:
    """How many joint components are stored at `ranks`: fewer where there are no more, or pivot rows span no more."""
    method, size = opened.request.method, opened.dtype.itemsize
    pivoted = torch.tensor([method.owner_spec(owner, int(rank), size).format == Pivoted.name for rank in ranks])
    spanned = truncated.spanned(0) if bool(pivoted.any()) else 0
    return torch.minimum(ranks, torch.where(pivoted, spanned, len(truncated.right)))
