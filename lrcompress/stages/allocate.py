"""From a ratio to a level for every weight: the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lrcompress.budget import removed
from lrcompress.formats import DENSE, spec_bytes
from lrcompress.protocols import Curve, Site, Spec
from lrcompress.stages.amount import budget_of
from lrcompress.stages.join import Join, find_joins
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import SUMMARY, Artefacts
from lrcompress.stages.sharing import joint_specs, levels_of


@dataclass
class Plan:
    """What is stored for every site. A relative error is the root of the squared error over the squared size, in the
    method's metric; there are none where nothing was decomposed."""

    specs: dict[str, Spec]
    bytes: dict[str, int]
    dense_bytes: dict[str, int]
    levels: dict[str, int]
    """Index into a site's errors; -1, the last, is dense."""
    relative_errors: dict[str, float] = field(default_factory=dict)
    joins: list[Join] = field(default_factory=list)
    removed: float = 0.0
    """Fraction that is removed of what the ratio counts: bytes, multiply-adds or ranks."""

    def family(self, name: str) -> list[str]:
        """The sites that share with `name`, itself included, the owner first."""
        owner = self.specs[name].owner or name
        return [owner, *(other for other, spec in self.specs.items() if spec.owner == owner)]

    def joined(self) -> list[dict[str, Any]]:
        """The weights that share a right factor, with the squared errors together and apart that spoke for it."""
        return [
            {"weights": join.names, "rank": self.specs[join.names[0]].rank, "bytes_apart": join.bytes,
             "squared_error_apart": join.separate_error, "squared_error_together": join.joint_error}
            for join in self.joins if self.specs[join.names[-1]].owner is not None
        ]  # fmt: skip

    def entries(self, sites: list[Site]) -> list[dict[str, Any]]:
        """The `targets` of report.json."""
        rows = []
        for site in sites:
            spec = self.specs[site.name]
            rows.append({
                "name": site.name,
                "format": spec.format,
                "shape": list(site.shape),
                "rank": spec.rank,
                "bytes": self.bytes[site.name],
                "dense_bytes": self.dense_bytes[site.name],
                "relative_error": self.relative_errors.get(site.name),
            })  # fmt: skip
        return rows


def needs_artefacts(opened: Opened) -> bool:
    """Whether the allocator decides by decompositions."""
    allocator = opened.request.allocator
    if opened.request.recipe.rank is not None or opened.request.recipe.type is not None:
        return False
    joins = any(opened.request.method.joins(site) for site in opened.sites)
    return allocator.needs_errors or allocator.needs_spectrum or joins


def needs_profile(opened: Opened) -> bool:
    """Whether anything reads the dense model's pass: not where every block is decomposed on compressed inputs alone."""
    request = opened.request
    # Embeddings are rounded before any block, by what the dense model's pass says.
    first = request.method.needs_gradients or needs_artefacts(opened) or bool(opened.embeddings)
    return first or not request.sequential


def allocate(opened: Opened, artefacts: Artefacts | None) -> Plan:
    """Choose a level per site: the asked rank's, or the allocator's within what the ratio or the size leaves.

    Where the method may join weights, what they get apart decides which err less together, and all is allocated anew.
    """
    known = {} if artefacts is None else summaries(opened, artefacts)
    kept = artefacts.sensitivities if artefacts is not None and opened.request.allocator.needs_sensitivity else None
    scales = kept or {}
    plan = allocated(opened, known, scales)
    if artefacts is None or not any(opened.request.method.joins(site) for site in opened.sites):
        return plan
    errors = {name: float(summary["errors"][plan.levels[name]]) for name, summary in known.items()}
    joins = find_joins(opened, artefacts, plan.bytes, errors)
    if not joins:
        return plan
    for join in joins:
        for name, own in join.errors.items():
            known[name] = {**known[name], "errors": own}
    return allocated(opened, known, scales, joins)


def allocated(
    opened: Opened,
    known: dict[str, dict[str, Tensor]],
    scales: Mapping[str, float] = MappingProxyType({}),
    joins: Sequence[Join] = (),
) -> Plan:
    """A plan of the `known` summaries, their errors scaled by site, with these joins and no others."""
    request, size = opened.request, opened.dtype.itemsize
    choices = opened.costs([join.names for join in joins])
    curves = [choice.stored for choice in choices]
    for choice in choices if known else []:
        names = [site.name for site in choice.sites]
        _sum_up(choice.stored, [known[name] for name in names], [scales.get(name, 1.0) for name in names])
    priced = [choice.priced(choice.stored) for choice in choices]
    if request.recipe.rank is not None:
        asked = {curve.name: rank_level(curve, request.recipe.rank) for curve in priced}
    elif request.recipe.type is not None:
        asked = {curve.name: 0 for curve in priced}
    else:
        asked = request.allocator.allocate(priced, budget_of(opened, choices))
    levels = {choice.stored.name: int(choice.levels[asked[choice.stored.name]]) for choice in choices}
    # Filled group by group, kept in the order of the sites.
    plan = Plan({site.name: Spec(DENSE, site.shape) for site in opened.sites}, {}, {}, {})
    plan.joins = list(joins)
    plan.removed = removed(sum(int(c.bytes[asked[c.name]]) for c in priced), sum(c.dense_bytes for c in priced))
    for choice, curve in zip(choices, curves, strict=True):
        sites = choice.sites
        level = levels[curve.name]
        for site, spec in zip(sites, level_specs(opened, sites, curve, level), strict=True):
            plan.specs[site.name] = spec
            plan.dense_bytes[site.name] = site.dense_bytes(size)
            plan.bytes[site.name] = site.dense_bytes(size) if spec.format == DENSE else spec_bytes(spec, size)
            plan.levels[site.name] = level if level < len(curve.ranks) - 1 else -1
    note_errors(plan, known)
    return plan


def summaries(opened: Opened, artefacts: Artefacts) -> dict[str, dict[str, Tensor]]:
    """Of every site, by name, what allocation needs of its artefact."""
    return {site.name: artefacts.load(site, SUMMARY) for site in opened.sites}


def note_errors(plan: Plan, known: dict[str, dict[str, Tensor]]) -> None:
    """Set the plan's relative errors to those of the `summaries`."""
    for name, summary in known.items():
        error, total = float(summary["errors"][plan.levels[name]]), float(summary["total"])
        plan.relative_errors[name] = float((max(error, 0.0) / total) ** 0.5) if total > 0 else 0.0


def _sum_up(curve: Curve, summaries: list[dict[str, Tensor]], scales: list[float]) -> None:
    """Give a curve the scaled errors of all its weights, and the root mean square of their singular values."""
    errors = [scale * levels_of(summary["errors"], curve) for summary, scale in zip(summaries, scales, strict=True)]
    curve.errors = torch.stack(errors).sum(0)
    if "spectrum" in summaries[0]:
        spectra = [summary["spectrum"] for summary in summaries]
        if len({len(spectrum) for spectrum in spectra}) == 1:
            curve.spectrum = torch.stack(spectra).square().mean(0).sqrt()
        else:  # joined weights of several shapes: the components of all of them
            curve.spectrum = torch.cat(spectra).sort(descending=True).values[: int(curve.ranks[-1])]


def rank_level(curve: Curve, rank: int) -> int:
    """The level of `rank`; the dense one where that rank would not be smaller."""
    return int(torch.searchsorted(curve.ranks, torch.tensor(rank)).clamp_max(len(curve.ranks) - 1))


def level_specs(opened: Opened, sites: list[Site], curve: Curve, level: int) -> list[Spec]:
    """How the sites of a curve are stored at a level; the last one is as they are, dense or not."""
    if level == len(curve.ranks) - 1:
        return [site.stored or Spec(DENSE, site.shape, site.bias, conv1d=site.conv1d) for site in sites]
    return joint_specs(opened.request.method, sites, int(curve.ranks[level]), opened.dtype.itemsize)
