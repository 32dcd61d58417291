"""lrcompress sweep"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrcompress.cli import options as o


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
    """A table per metric: methods by ratios, times the dense model's where it is a perplexity."""
    from rich.table import Table

    from lrcompress.report.summary import is_error

    tables = []
    ratios = sorted({row["ratio"] for row in result["points"]})
    rows = {
        (r["method"], r["seed"]): r["method"] + (f", seed {r['seed']}" if r["seed"] else "") for r in result["points"]
    }
    for task, metrics in result["dense"]["results"].items():
        for metric, dense in metrics.items():
            if isinstance(dense, int) or is_error(metric, metrics):
                continue
            table = Table(title=f"{task} {metric}, dense {dense:.4g}")
            table.add_column("removed")
            for ratio in ratios:
                table.add_column(f"{ratio:.0%}", justify="right")
            for key, label in rows.items():
                found = {r["ratio"]: r["results"].get(task, {}).get(metric) for r in result["points"]
                         if (r["method"], r["seed"]) == key}  # fmt: skip
                table.add_row(label, *(_cell(metric, found.get(ratio), dense) for ratio in ratios))
            tables.append(table)
    return tables


def _cell(metric: str, value: float | None, dense: float) -> str:
    if value is None:
        return "-"
    return f"{value:.4g} (x{value / dense:.2f})" if "perplexity" in metric else f"{value:.4f} ({value - dense:+.4f})"
