"""From a ratio to a level for every weight: the plan."""

from dataclasses import dataclass, field
from typing import Any

import torch

from lrcompress.protocols import Curve, Site, Spec
from lrcompress.stages.prepare import Opened, budget_of
from lrcompress.stages.profile import SUMMARY, Artefacts


@dataclass
class Plan:
    """What is stored for every site. A relative error is the root of the squared error over the squared size, in the
    method's metric; there are none where nothing was decomposed."""

    specs: dict[str, Spec]
    bytes: dict[str, int]
    dense_bytes: dict[str, int]
    levels: dict[str, int]
    relative_errors: dict[str, float] = field(default_factory=dict)

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
    if opened.request.recipe.rank is not None:
        return False
    return allocator.needs_errors or allocator.needs_spectrum


def allocate(opened: Opened, artefacts: Artefacts | None) -> Plan:
    """Choose a level per site: the asked rank's, or the allocator's within the bytes that the ratio leaves."""
    request, size = opened.request, opened.dtype.itemsize
    curves = [request.method.curve(site, size) for site in opened.sites]
    if artefacts is not None:
        for site, curve in zip(opened.sites, curves, strict=True):
            summary = artefacts.load(site, SUMMARY)
            curve.errors, curve.spectrum = summary["errors"], summary.get("spectrum")
    if request.recipe.rank is not None:
        levels = {curve.name: rank_level(curve, request.recipe.rank) for curve in curves}
    else:
        levels = request.allocator.allocate(curves, budget_of(request, curves))
    plan = Plan({}, {}, {}, {})
    for site, curve in zip(opened.sites, curves, strict=True):
        level = levels[site.name]
        plan.specs[site.name] = level_spec(opened, site, curve, level)
        plan.bytes[site.name] = int(curve.bytes[level])
        plan.dense_bytes[site.name] = curve.dense_bytes
        plan.levels[site.name] = level
    if artefacts is not None:
        note_errors(opened, plan, artefacts)
    return plan


def note_errors(opened: Opened, plan: Plan, artefacts: Artefacts) -> None:
    """Set the plan's relative errors to those of `artefacts`."""
    for site in opened.sites:
        summary = artefacts.load(site, SUMMARY)
        error, total = float(summary["errors"][plan.levels[site.name]]), float(summary["total"])
        plan.relative_errors[site.name] = (max(error, 0.0) / total) ** 0.5 if total > 0 else 0.0


def rank_level(curve: Curve, rank: int) -> int:
    """The level of `rank`; the dense one where that rank would not be smaller."""
    return int(torch.searchsorted(curve.ranks, torch.tensor(rank)).clamp_max(len(curve.ranks) - 1))


def level_spec(opened: Opened, site: Site, curve: Curve, level: int) -> Spec:
    """How a site is stored at a level; the last one is dense."""
    if level == len(curve.ranks) - 1:
        return Spec("dense", site.shape, site.bias, conv1d=site.conv1d)
    return opened.request.method.spec(site, int(curve.ranks[level]), opened.dtype.itemsize)
