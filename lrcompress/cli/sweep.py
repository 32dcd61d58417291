"""lrcompress sweep"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrcompress.cli import options as o

COUNTS = ("tokens", "blocks")


def sweep(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a shipped one such as sweep.", show_default=False)],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as ratios=[0.2].")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Output folder instead of the recipe's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget the points that the folder has.")] = False,
    cache: o.Cache = None,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Compress and measure methods x ratios x seeds; points measured before are kept."""
    from lrcompress.recipe import load_sweep

    loaded = load_sweep(recipe, [*(settings or []), *([f"output={output}"] if output else [])])
    from lrcompress.cli.show import console, quiet_libraries
    from lrcompress.report.progress import Reporter
    from lrcompress.sweep import sweep as run_sweep

    quiet_libraries()
    o.check_result(json_file, Path(loaded.output).expanduser())
    result = run_sweep(loaded, overwrite=overwrite, reporter=Reporter(quiet=quiet))
    if not quiet:
        for table in sweep_tables(result):
            console().print(table)
        typer.echo(f"wrote {loaded.output}: sweep.csv, results.json and pictures")
    o.write_result(json_file, result)


def sweep_tables(result: dict[str, Any]) -> list[Any]:
    """A table per metric: methods by ratios, times the dense model's where it is a perplexity, and the paired test."""
    from rich.table import Table

    from lrcompress.report.measured import is_error
    from lrcompress.report.table import metrics_of

    tables = []
    ratios = sorted({row["ratio"] for row in result["points"]})
    rows = {
        (r["method"], r["seed"]): r["method"] + (f", seed {r['seed']}" if r["seed"] else "") for r in result["points"]
    }
    points = {(r["method"], r["seed"], r["ratio"]): r for r in result["points"]}
    metrics = metrics_of(result)
    for task, metric in metrics:
        dense = result["dense"]["results"].get(task, {}).get(metric)
        if metric in COUNTS or is_error(metric, [other for t, other in metrics if t == task]):
            continue
        table = Table(title=f"{task} {metric}" + ("" if dense is None else f", dense {dense:.4g}"))
        table.add_column("removed")
        for ratio in ratios:
            table.add_column(f"{100 * ratio:.10g}%", justify="right")
        for (method, seed), label in rows.items():
            table.add_row(label, *(_cell(task, metric, points.get((method, seed, r)), dense) for r in ratios))
        tables.append(table)
    return tables


def _cell(task: str, metric: str, point: dict[str, Any] | None, dense: float | None) -> str:
    value = None if point is None else point["results"].get(task, {}).get(metric)
    if point is None or value is None:
        return "-"
    said = []
    if dense is not None:
        said.append(f"x{value / dense:.2f}" if "perplexity" in metric else f"{value - dense:+.4f}")
    if test := point.get("tests", {}).get(task, {}).get(metric):
        said.append("significant" if test["significant"] else "not significant")
    shown = f"{value:.4g}" if "perplexity" in metric else f"{value:.4f}"
    return f"{shown} ({', '.join(said)})" if said else shown
