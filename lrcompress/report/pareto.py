"""The picture of a sweep: a perplexity against bytes, a line per method, the dense model beside them."""

from pathlib import Path
from typing import Any

from lrcompress.checkpoint.writer import disk_errors

BEYOND = 100
"""What is worse than this many times the dense model lies outside of a picture, whose lines point there."""


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """One SVG in `folder` per perplexity of the dense model; seeds of a method are averaged geometrically."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lrcompress"  # the same picture gives the same file
    written = []
    for task, values in result["dense"]["results"].items():
        for metric in values:
            if metric.endswith("perplexity"):
                name = task.replace(":", "-").replace("@", "-").replace("/", "-")
                path = folder / f"pareto-{name}-{metric}.svg"
                with disk_errors(folder):
                    _draw(result, task, metric, path)
                written.append(path)
    return written


def curves(result: dict[str, Any], task: str, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Method to (bytes, value) by rising bytes; points that a metric is missing from are left out."""
    groups: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for row in result["points"]:
        value = row["results"].get(task, {}).get(metric)
        if value is not None:
            groups.setdefault((row["method"], row["ratio"]), []).append((row["bytes"], value))
    found: dict[str, list[tuple[float, float]]] = {}
    for (method, _), rows in groups.items():
        product = 1.0
        for _, value in rows:
            product *= value ** (1 / len(rows))
        found.setdefault(method, []).append((sum(b for b, _ in rows) / len(rows), product))
    return {method: sorted(rows) for method, rows in found.items()}


def _draw(result: dict[str, Any], task: str, metric: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.5), layout="constrained")
    dense = result["dense"]
    base = dense["results"][task][metric]
    found = curves(result, task, metric)
    for method, rows in found.items():
        axes.plot([b / 1e6 for b, _ in rows], [v for _, v in rows], marker="o", markersize=4, label=method)
    axes.axhline(base, color="0.4", linestyle=":", linewidth=1)
    axes.plot([dense["bytes"] / 1e6], [base], "D", color="0.2", label=f"dense {base:.4g}", gid="dense")
    axes.set_yscale("log")
    values = [base, *(value for rows in found.values() for _, value in rows if value <= BEYOND * base)]
    axes.set_ylim(0.85 * min(values), 1.25 * max(values))
    axes.set_xlabel("checkpoint, MB")
    axes.set_ylabel(f"{metric.replace('_', ' ')}, {task}")
    axes.set_title(str(result["model"]))
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
