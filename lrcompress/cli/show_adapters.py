"""What the commands for adapters print."""

from typing import Any

from rich.table import Table

from lrcompress.cli.show import console
from lrcompress.foreign.opening import short_name
from lrcompress.report.summary import block_kinds, span


def show_squeeze(report: dict[str, Any], *, quiet: bool, written: bool) -> None:
    """Kinds of modules with their ranks, bytes and errors."""
    if quiet:
        return
    out = console()
    table = Table(title=f"{short_name(report['adapter'])}, squeezed")
    for column in ("module", "count", "rank", "of", "kB", "removed", "error"):
        table.add_column(column, justify="left" if column == "module" else "right")
    kinds = block_kinds([module["name"] for module in report["modules"]])
    groups: dict[str, list[dict[str, Any]]] = {}
    for module in report["modules"]:
        groups.setdefault(kinds[module["name"]], []).append(module)
    for kind, modules in groups.items():
        table.add_row(kind, *_squeezed_row(modules))
    table.add_section()
    table.add_row("all", *_squeezed_row(report["modules"]))
    out.print(table)
    size = report["bytes"]
    if report["carried"]:
        out.print(f"kept as they are: {len(report['carried'])} tensors that are no update of a linear layer")
    out.print(
        f"{'removed' if written else 'would remove'} {report['ratio']:.2%} of the factors' bytes "
        f"({size['before'] / 1e6:.3f} to {size['after'] / 1e6:.3f} MB); relative error of all updates "
        f"{report['relative_error']:.4f} (metric {report['metric']})"
    )
    if written:
        out.print(f"wrote {report['output']}")


def _squeezed_row(modules: list[dict[str, Any]]) -> list[str]:
    before, after = (sum(m[key] for m in modules) for key in ("bytes_before", "bytes"))
    errors = [m["relative_error"] for m in modules]
    spans = [span([m[key] for m in modules]) for key in ("rank", "rank_before")]
    mean = sum(errors) / len(errors)
    return [str(len(modules)), *spans, f"{after / 1e3:.1f}", f"{1 - after / before:.1%}", f"{mean:.3f}"]


def show_merge(report: dict[str, Any], *, quiet: bool, written: bool) -> None:
    """Every task with its bytes before and its error after."""
    if quiet:
        return
    out = console()
    table = Table(title=f"{len(report['tasks'])} tasks, one basis")
    for column in ("task", "MB before", "error"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in report["tasks"]:
        table.add_row(task["name"], f"{task['bytes'] / 1e6:.3f}", f"{task['relative_error']:.4f}")
    out.print(table)
    size, elements = report["bytes"], [module["elements"] for module in report["modules"]]
    out.print(
        f"{'saved' if written else 'would save'} {report['ratio']:.2%} of the factors' bytes "
        f"({size['separate'] / 1e6:.3f} to {size['shared'] / 1e6:.3f} MB) with {span(elements)} elements a module; "
        f"relative error of all tasks {report['relative_error']:.4f}"
    )
    if written:
        out.print(f"wrote {report['output']}")
