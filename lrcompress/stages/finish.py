"""report.json of a finished checkpoint: counted from its files, not from the plan."""

from pathlib import Path
from typing import Any

from lrcompress.budget import Ratio
from lrcompress.calibration.corpus import NARROW
from lrcompress.checkpoint.experts import ExpertReader
from lrcompress.checkpoint.manifest import counted
from lrcompress.formats import DENSE
from lrcompress.model.skeleton import auto_class
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import peak_rss_bytes, versions
from lrcompress.stages.allocate import Plan
from lrcompress.stages.opened import Opened


def make_report(opened: Opened, plan: Plan, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """The report so far; evaluation adds to it. `seconds.total` covers everything up to here."""
    recipe = opened.request.recipe
    compressed = [name for name, spec in plan.specs.items() if spec.format != DENSE]
    reader = ExpertReader(folder, opened.skeleton, compressed)  # experts that all stayed dense are fused in the files
    found = counted(reader.metas(), opened.sites)
    ratio = Ratio(
        asked=recipe.ratio,
        of=recipe.ratio_of,
        counted=None if recipe.ratio_of == "bytes" else plan.removed,
        targets_dense=sum(plan.dense_bytes.values()),
        targets_stored=sum(size for size, _ in found.values()),
        checkpoint_dense=opened.dense_checkpoint_bytes,
        checkpoint=reader.bytes,
        numbers_dense=sum(s.shape[0] * s.shape[1] for s in opened.sites),
        numbers_stored=sum(numbers for _, numbers in found.values()),
    )
    entries = plan.entries(opened.sites)
    for entry, site in zip(entries, opened.sites, strict=True):
        entry["bytes"] = found[site.name][0]
    return {
        "schema": 1,
        "model": recipe.model,
        "method": opened.request.method.name,
        "metric": opened.request.method.metric,
        "allocator": opened.request.amount_by,
        "base": opened.request.method.base,
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.seed,
        "ratio": ratio.as_json(),
        "bytes": {
            "targets_dense": ratio.targets_dense,
            "targets_stored": ratio.targets_stored,
            "checkpoint": reader.bytes,
        },
        "calibration": _calibration(opened),
        "seconds": {key: reporter.seconds.get(key, 0.0) for key in ("load", "calibrate", "decompose", "write")},
        "peak_rss_bytes": peak_rss_bytes(),
        "targets": entries,
        **({"joined": plan.joined()} if plan.joins else {}),
        "left_dense": opened.left_dense(),
        "loads_with": auto_class(opened.skeleton.config).__name__,
        "warnings": list(reporter.warnings),
        "versions": versions(),
    }


def _calibration(opened: Opened) -> dict[str, Any] | None:
    if opened.calibration is None or not opened.request.method.needs_statistics:
        return None
    sources = [spec.source for spec in opened.request.recipe.calibration]
    return {
        "sources": sources,
        "tokens": opened.calibration.tokens,
        **({"images": opened.calibration.images} if opened.calibration.images else {}),
        "sha256": opened.calibration.digest(),
        "general": not any(source.name in NARROW for source, _, _ in opened.request.sources),
    }
