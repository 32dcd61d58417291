"""From a ratio to a level for every weight: the plan."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcompress.formats import spec_bytes
from lrcompress.protocols import Curve, Site, Spec
from lrcompress.stages.prepare import Opened, budget_of
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.sharing import joint_curve, joint_specs, levels_of, sharing


@dataclass
class Plan:
    """What is stored for every site. relative_errors are None where nothing was decomposed."""

    specs: dict[str, Spec]
    bytes: dict[str, int]
    dense_bytes: dict[str, int]
    relative_errors: dict[str, float | None]

    def family(self, name: str) -> list[str]:
        """The sites that share with `name`, itself included, the owner first."""
        owner = self.specs[name].owner or name
        return [owner, *(other for other, spec in self.specs.items() if spec.owner == owner)]

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
                "relative_error": self.relative_errors[site.name],
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
    groups = sharing(request.method, opened.sites, len(opened.blocks))
    curves = [joint_curve(request.method, sites, size) for sites in groups]
    summaries: dict[str, dict[str, Tensor]] = {}
    if artefacts is not None:
        summaries = {site.name: artefacts.load(site, summary=True) for site in opened.sites}
        for sites, curve in zip(groups, curves, strict=True):
            _sum_up(curve, [summaries[site.name] for site in sites])
    if request.recipe.rank is not None:
        levels = {curve.name: rank_level(curve, request.recipe.rank) for curve in curves}
    else:
        levels = request.allocator.allocate(curves, budget_of(request, curves))
    chosen: dict[str, tuple[Spec, float | None]] = {}
    for sites, curve in zip(groups, curves, strict=True):
        level = levels[curve.name]
        for site, spec in zip(sites, level_specs(opened, sites, curve, level), strict=True):
            chosen[site.name] = spec, relative_error(summaries.get(site.name), curve, level)
    plan = Plan({}, {}, {}, {})
    for site in opened.sites:
        plan.specs[site.name], plan.relative_errors[site.name] = chosen[site.name]
        plan.bytes[site.name] = spec_bytes(plan.specs[site.name], size)
        plan.dense_bytes[site.name] = site.shape[0] * site.shape[1] * size
    return plan


def _sum_up(curve: Curve, summaries: list[dict[str, Tensor]]) -> None:
    """Give a curve the errors of all its weights together, and the root mean square of their singular values."""
    curve.errors = torch.stack([levels_of(summary["errors"], curve) for summary in summaries]).sum(0)
    if "spectrum" in summaries[0]:
        spectra = torch.stack([summary["spectrum"] for summary in summaries])
        curve.spectrum = spectra.square().mean(0).sqrt() if len(spectra) > 1 else spectra[0]


def rank_level(curve: Curve, rank: int) -> int:
    """The level of `rank`; the dense one where that rank would not be smaller."""
    return int(torch.searchsorted(curve.ranks, torch.tensor(rank)).clamp_max(len(curve.ranks) - 1))


def level_specs(opened: Opened, sites: list[Site], curve: Curve, level: int) -> list[Spec]:
    """How the sites of a curve are stored at a level; the last one is dense."""
    if level == len(curve.ranks) - 1:
        return [Spec("dense", site.shape, site.bias, conv1d=site.conv1d) for site in sites]
    return joint_specs(opened.request.method, sites, int(curve.ranks[level]), opened.dtype.itemsize)


def relative_error(summary: dict[str, Tensor] | None, curve: Curve, level: int) -> float | None:
    """Root of a weight's squared error over its squared size, in the method's metric."""
    if summary is None:
        return None
    total, error = float(summary["total"]), float(levels_of(summary["errors"], curve)[level])
    return float((max(error, 0.0) / total) ** 0.5) if total > 0 else 0.0
