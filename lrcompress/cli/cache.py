"""lrcompress cache"""

from enum import StrEnum
from typing import Annotated, Literal

import typer

from lrcompress.cli import options as o

WIDTH = 46
"""Columns of what an entry is, at most: a table takes 80."""


class Action(StrEnum):
    """What to do with the cache beside looking at it."""

    clear = "clear"


def cache(
    action: Annotated[Action | None, typer.Argument(help="Delete what is listed.", show_default=False)] = None,
    cache: o.Cache = None,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """List what is kept between runs, or delete it; nothing is lost but time."""
    from rich.table import Table

    from lrcompress.checkpoint.cache import clear, entries
    from lrcompress.cli.show import console
    from lrcompress.folders import cache_folder

    found = entries() if action is None else clear()
    size = sum(entry.bytes for entry in found)
    if not quiet:
        table = Table()
        for column in ("kind", "what", "MB"):
            justify: Literal["left", "right"] = "right" if column == "MB" else "left"
            table.add_column(column, justify=justify, max_width=WIDTH, overflow="fold")
        for entry in found:
            table.add_row(entry.kind, entry.label, f"{entry.bytes / 1e6:.3f}")
        out = console()
        if found:
            out.print(table)
        verb = "holds" if action is None else "held, now deleted,"
        out.print(f"{cache_folder()} {verb} {len(found)} entries, {size / 1e6:.1f} MB", markup=False)
    rows = [{"kind": e.kind, "what": e.label, "path": str(e.path), "bytes": e.bytes} for e in found]
    o.write_result(json_file, {"schema": 1, "folder": str(cache_folder()), "bytes": size, "entries": rows})
