"""Printing results: tables on stdout."""

import logging
import math
import os
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lrcompress.report.held_out import times_dense, windows_in_words
from lrcompress.report.inspection import removed_by_block, sparkline
from lrcompress.report.measured import measurements
from lrcompress.report.summary import (
    answer,
    block_kinds,
    change,
    dense_parts_in_words,
    kinds_table,
    narrow_table,
    removed_in_words,
)

METRIC = 17
"""Columns of a metric's name, of a task's with line breaks."""


def quiet_libraries() -> None:
    """Keep the log lines and bars of the libraries off the terminal; ours say what matters."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _hide_bars()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


@cache
def _hide_bars() -> None:
    """Of tqdm, whose TQDM_DISABLE holds only for those that say nothing of their own."""
    from tqdm import tqdm

    init = tqdm.__init__

    def hidden(bar: Any, *arguments: Any, **options: Any) -> None:
        init(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__ = hidden


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=120, soft_wrap=True)


def show_report(report: dict[str, Any], folder: Path, *, quiet: bool, written: bool = True) -> None:
    """The final table, and where the checkpoint was written."""
    if quiet:
        return
    from lrcompress.evaluation.in_use import stored_in_use

    out = console()
    out.print(kinds_table(report, block_kinds([t["name"] for t in report["targets"]])))
    size, seconds = report["bytes"], report["seconds"]
    out.print(
        f"{removed_in_words(report)}; "
        f"checkpoint {size['checkpoint'] / 1e6:.1f} MB; {seconds['total']:.0f} s, "
        f"peak memory {report['peak_rss_bytes'] / 1e6:.0f} MB"
    )
    if said := answer(report, report["recipe"]):
        out.print(said)
    show_joined(report, out)
    if in_use := stored_in_use(report, folder):
        out.print(str(in_use))
    if written:
        out.print(f"wrote {folder}")
    out.print(in_one_line(report, folder))


def show_finished(report: dict[str, Any], folder: Path, *, quiet: bool) -> None:
    """What a checkpoint is and what was measured of it, from its report."""
    show_report(report, folder, quiet=quiet, written=False)
    if report.get("evaluation") is not None:
        show_evaluation(report["evaluation"], quiet=quiet)
    if not quiet:
        console().print(f"a page about it: lrcompress report {folder} --html FILE.html")


def in_one_line(report: dict[str, Any], folder: Path) -> str:
    """What came of it, and what to do next."""
    size, held_out = report["bytes"], report.get("held_out")
    before = size["checkpoint"] - size["targets_stored"] + size["targets_dense"]
    said = f"{_megabytes(before)} → {_megabytes(size['checkpoint'])} MB"
    if held_out is not None:
        said += f", perplexity × {times_dense(held_out)} on {windows_in_words(held_out)} of held-out calibration text"
    if report.get("evaluation") is not None or not folder.is_dir():
        return said
    return f"{said}; next: lrcompress eval {folder} --tasks YOUR.txt"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f}" if size >= 10**7 else f"{size / 1e6:.2g}"


def show_joined(report: dict[str, Any], out: Console) -> None:
    """How many weights share a factor, and what that gained."""
    joined = report.get("joined", [])
    if joined:
        apart, together = (sum(j[f"squared_error_{key}"] for j in joined) for key in ("apart", "together"))
        out.print(
            f"{len(joined)} groups of weights share their right factor: their squared error is {together / apart:.1%} "
            "of what it is apart at no fewer bytes"
        )


def show_evaluation(result: dict[str, Any], *, quiet: bool) -> None:
    """Metrics of one model or two with the change, then the expectations."""
    out = console()
    if not quiet:
        out.print(evaluation_table(result))
    show_expectations(result["expectations"], quiet=quiet)


def show_expectations(judged: list[dict[str, Any]], *, quiet: bool) -> None:
    """Which were met; only those that were not, when quiet."""
    out = console()
    for entry in judged:
        mark = "[green]met[/]" if entry["met"] else "[red]MISSED[/]"
        if not quiet or not entry["met"]:
            out.print(f"{mark} {entry['expression']}: {entry['value']:.6g} (limit {entry['limit']:.6g})")


def evaluation_table(result: dict[str, Any]) -> Table:
    """A row per metric under its task's, with standard errors; against another model whether it differs is no accident.

    In 80 columns: a task's name is folded, and cells have one space between them.
    """
    against = result["against"]
    table = narrow_table(result["model"])
    table.caption = f"against {against['model']}" if against else None
    table.add_column("task, metric", max_width=METRIC, overflow="fold")
    for column in ["value", *(["against", "change", "differs"] if against else [])]:
        table.add_column(column, justify="right")
    task = None
    for row in measurements(result):
        if row.task != task:
            task = row.task
            table.add_row(row.measured)
        cells = [f" {row.metric}", row.shown]
        if against:
            cells += [row.other_shown or "-", "-" if row.other is None else change(row.metric, row.value, row.other)]
            dim = row.test is not None and not row.test["significant"]
            cells.append(f"[dim]{row.differs}[/]" if dim else row.differs)
        table.add_row(*cells)
    return table


def show_inspection(result: dict[str, Any], *, quiet: bool) -> None:
    """Kinds of weights with their formats, what went from which block; a spectrum as bars where it was asked for."""
    if quiet:
        return
    out = console()
    kinds = block_kinds([t["name"] for t in result["targets"]])
    out.print(kinds_table(result, kinds))
    size = result["bytes"]
    frozen = f", {result['frozen']} dense weights marked frozen" if result["frozen"] else ""
    out.print(f"{result['dtype']}, checkpoint {size['checkpoint'] / 1e6:.1f} MB{frozen}")
    if dense := dense_parts_in_words(result["left_dense"]):
        out.print(f"left dense beside the blocks: {dense}")
    if size["targets_stored"] != size["targets_dense"]:
        out.print(_removed_table(result))
    products = Counter(t["product"] for t in result["targets"] if "product" in t)
    if products:
        shown = ", ".join(f"{count} {name}" for name, count in sorted(products.items()))
        shared = sum("shared" in t for t in result["targets"])
        others = f"; {shared} use the dictionary of another block" if shared else ""
        out.print(f"codes of sparse dictionaries are multiplied: {shown}{others}")
    joined = sum("shared" in t and t["format"] == "low_rank" for t in result["targets"])
    if joined:
        out.print(f"{joined} low-rank weights use the right factor of another weight")
    if any("spectrum" in t for t in result["targets"]):
        table = Table(title="singular values, largest to smallest")
        for column in ("weight", "spectrum", "largest", "smallest"):
            table.add_column(column)
        for target in result["targets"]:
            values = target["spectrum"]
            table.add_row(target["name"], sparkline(values), f"{values[0]:.3g}", f"{values[-1]:.3g}")
        out.print(table)


def _removed_table(result: dict[str, Any]) -> Table:
    table = Table(title="bytes removed, block by block")
    for column in ("weight", "first to last", "least", "most"):
        table.add_column(column, justify="right" if column in ("least", "most") else "left")
    rows = removed_by_block(result["targets"])
    most = max((max(removed) for removed in rows.values()), default=0.0)
    for kind, removed in rows.items():
        table.add_row(kind, sparkline(removed, most), f"{min(removed):.1%}", f"{max(removed):.1%}")
    return table


def show_export(result: dict[str, Any], *, quiet: bool) -> None:
    """What was written, how large."""
    if quiet:
        return
    sizes = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in result["bytes"].items())
    what = f"exported {result['layers']} layers" if result["layers"] else f"converted {result['checkpoint']}"
    console().print(f"{what} to {result['to']}: {sizes}")
    for note in result.get("notes", []):
        console().print(note)
    console().print(f"wrote {result['output']}")


def show_training(found: dict[str, Any], folder: Path, *, quiet: bool) -> None:
    """What healing did to a checkpoint, and what it took."""
    if quiet:
        return
    loss, kept = found["held_out"], found["kept"]
    console().print(
        f"held-out perplexity {_perplexity(loss['before'])} to {_perplexity(loss['after'])}"
        + ("" if kept else ", the weights are unchanged")
        + f"; {found['minutes']:.1f} minutes, {found['steps']} steps, {found['tokens']} tokens "
        f"({found['tokens_per_second']:.0f}/s)\n"
        f"trained {found['trainable'] / 1e6:.2f} M numbers, optimiser {found['optimizer_bytes'] / 1e6:.1f} MB, "
        f"peak memory {found['peak_rss_bytes'] / 1e6:.0f} MB\nwrote {folder}"
    )


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):.4g}"
