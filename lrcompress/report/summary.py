"""report.json of a finished checkpoint, and what is said of it in tables and words."""

import platform
import resource
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from lrcompress.budget import FEW_TARGETS, bits_per_weight
from lrcompress.checkpoint.reader import read_json_object
from lrcompress.formats import DENSE


def versions() -> dict[str, str]:
    """Versions of what took part."""
    names = ("lrcompress", "torch", "transformers", "safetensors", "lm_eval")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@cache
def version(name: str) -> str:
    """Of an installed package, whose long description is read for it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def computing_versions() -> dict[str, str]:
    """Those of `versions` whose code computes a checkpoint's numbers."""
    return {name: found for name, found in versions().items() if name in ("lrcompress", "torch", "transformers")}


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def kinds_table(report: dict[str, Any], kinds: dict[str, str]) -> Table:
    """Per kind of weight: how many, formats, rank of the full one, bytes, error; kinds: a target's name to its kind."""
    targets = report["targets"]
    ranks = any(target["rank"] and target["format"] != DENSE for target in targets)
    empty = {
        "rank": not ranks,
        "removed": all(target["bytes"] == target["dense_bytes"] for target in targets),
        "error": all(target["relative_error"] is None for target in targets),
    }
    title = f"{report['model']} · {report['method']}"
    table = narrow_table(title) if ranks else Table(title=title)
    shown = [name for name in COLUMNS if not empty.get(name)]
    for column in shown:
        justify: Literal["left", "right"] = "left" if column in ("weight", "format") else "right"
        table.add_column(column, justify=justify, max_width=FOLDED.get(column), overflow="fold")
    groups: dict[str, list[dict[str, Any]]] = {}
    for target in report["targets"]:
        groups.setdefault(kinds[target["name"]], []).append(target)
    for kind, targets in groups.items():
        table.add_row(kind, *_row(targets, shown))
    table.add_section()
    table.add_row("targets", *_row(report["targets"], shown))
    return table


COLUMNS = ("weight", "count", "format", "rank", "MB", "bpw", "removed", "error")
"""Ranks, removed bytes and errors are left out where nothing has them."""
FOLDED = {"format": 12, "rank": 9}
"""Columns of what is folded, so that 80 are enough for a table."""


def narrow_table(title: str) -> Table:
    """A table of many columns, with one space between them and no lines."""
    return Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)


def _row(targets: Sequence[dict[str, Any]], shown: Sequence[str]) -> list[str]:
    formats = [t["format"] for t in targets]
    kinds = sorted(set(formats))
    mix = [f"{formats.count(f)} {f}" for f in kinds] if len(kinds) > 1 else kinds
    ranks = [t["rank"] for t in targets]
    full = [min(t["shape"]) for t in targets]
    stored, dense = sum(t["bytes"] for t in targets), sum(t["dense_bytes"] for t in targets)
    errors = [t["relative_error"] for t in targets if t["relative_error"] is not None]
    error = f"{sum(errors) / len(errors):.3f}" if errors else "-"
    cells = {
        "count": str(len(targets)),
        "format": "\n".join(f if len(f) <= FOLDED["format"] else f.replace("_", "_\n") for f in mix),
        "rank": f"{span(ranks)} of {span(full)}" if any(ranks) else "-",
        "MB": f"{stored / 1e6:.2f}",
        "bpw": f"{bits_per_weight(stored, sum(t['shape'][0] * t['shape'][1] for t in targets)):.2f}",
        "removed": f"{1 - stored / dense:.1%}",
        "error": error,
    }
    return [cells[name] for name in shown if name in cells]


def span(values: Sequence[int]) -> str:
    """One number, or the least and the largest."""
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def block_kinds(names: Sequence[str]) -> dict[str, str]:
    """Each name without its block's number: model.layers.3.mlp.up_proj becomes mlp.up_proj."""
    return {name: block_and_kind(name)[1] for name in names}


def block_and_kind(name: str) -> tuple[int | None, str]:
    """model.layers.3.mlp.up_proj is in block 3, of kind mlp.up_proj; what is in no block is a kind of its own.

    Experts are of one kind: model.layers.3.mlp.experts.7.up_proj of kind mlp.experts.*.up_proj.
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return None, name
    return int(parts[first]), ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def change(metric: str, value: float, other: float) -> str:
    """A factor for perplexities, a difference for everything else."""
    return f"x{value / other:.3f}" if "perplexity" in metric and other else f"{value - other:+.4f}"


MEASURES = {"bytes": "stored bytes", "flops": "multiply-adds", "rank": "ranks"}


def answer(report: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """What was asked for and what came of it, where that was not a ratio of bytes or a rank."""
    ratio = report["ratio"]
    if recipe.get("size") is not None:
        return f"asked for a checkpoint of at most {recipe['size']}"
    if recipe.get("bpw") is not None:
        return f"asked for at most {recipe['bpw']:g} bits a weight of the targets"
    if recipe.get("type") is not None:
        return f"asked for the block types of a GGUF {recipe['type']}"
    if ratio.get("of", "bytes") != "bytes":
        return f"asked for {ratio['asked']:.2%} of the targets' {MEASURES[ratio['of']]}, removed {ratio['counted']:.2%}"
    if search := report.get("search"):
        return (
            f"asked for a perplexity on held-out calibration text at most {search['max_loss']:.2%} above the dense "
            f"model's {search['dense_perplexity']:.4g}: {search['loss']:+.2%} at ratio {search['ratio']:.4f}, "
            f"of {len(search['candidates'])} measured"
        )
    return None


def targets_share(report: dict[str, Any]) -> float:
    """The part of the dense checkpoint's bytes that the targets have."""
    size = report["bytes"]
    return float(size["targets_dense"] / (size["checkpoint"] - size["targets_stored"] + size["targets_dense"]))


def dense_parts_in_words(parts: Sequence[dict[str, Any]]) -> str | None:
    """The parts beside the blocks that stay dense, with their parameters; None where there are none."""
    named = [f"{part['name']} ({part['parameters'] / 1e6:.3g} M parameters)" for part in parts]
    return ", ".join(named) or None


def removed_in_words(report: dict[str, Any]) -> str:
    """How much smaller it is: the whole model first where the targets are a small part of it."""
    ratio, share = report["ratio"], targets_share(report)
    if share < FEW_TARGETS:
        return (
            f"removed {ratio['whole_model']:.2%} of the whole model: the targets are {share:.0%} of it, "
            f"and {ratio['stored']:.2%} of their bytes are gone, {bits_stored(report):.2f} bits a weight are left"
        )
    return (
        f"removed {ratio['stored']:.2%} of the targets' bytes, {bits_stored(report):.2f} bits a weight are left; "
        f"{ratio['whole_model']:.2%} of the whole model"
    )


def bits_stored(report: dict[str, Any]) -> float:
    """Bits that the targets' stored bytes are for each of their weights."""
    numbers = sum(target["shape"][0] * target["shape"][1] for target in report["targets"])
    return bits_per_weight(report["bytes"]["targets_stored"], numbers)


def caution(metric: str | None, base: str | None, *, general: bool) -> str | None:
    """What a reader should know before using such a checkpoint; `general` is whether its text was (if it read any)."""
    if metric == "plain" and base is None:
        return "metric plain reads no calibration text: on small models it destroys the model; measure before use"
    if not general:
        return (
            "calibrated on python-docs or the model's own text, which is not general text: "
            "pass --calibration with text like what the model will read"
        )
    return None


def load_report(folder: Path) -> dict[str, Any] | None:
    """report.json of a compressed checkpoint, None where a folder has none, or another program's."""
    report = read_report(folder) or {}
    recipe, ratio = report.get("recipe"), report.get("ratio")
    if not (isinstance(recipe, dict) and isinstance(ratio, dict) and isinstance(ratio.get("stored"), float)):
        return None
    sources = recipe.get("calibration")
    read = isinstance(sources, list) and all(isinstance(spec, dict) and "source" in spec for spec in sources)
    return report if read else None


def read_report(folder: Path) -> dict[str, Any] | None:
    """Whatever report.json a folder has; InputError where that is no JSON object."""
    path = folder / "report.json"
    return read_json_object(path, ": remove it, or write the checkpoint again") if path.is_file() else None
