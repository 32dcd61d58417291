"""lrcompress methods"""

from typing import Any

import typer

from lrcompress.cli import options as o


def methods(json_file: o.Json = None) -> None:
    """List the methods: paper, metric, formats, allocator, options with defaults; allocators and bases."""
    from rich.table import Table

    from lrcompress.allocators import ALLOCATORS
    from lrcompress.bases import BASES
    from lrcompress.cli.show import console
    from lrcompress.methods import METHODS

    rows: list[dict[str, Any]] = []
    for name in METHODS.names():
        cls = METHODS.get(name)
        defaults = {key: field.get_default() for key, field in cls.Options.model_fields.items()}
        rows.append({
            "name": name, "title": cls.title, "paper": cls.paper, "summary": cls.summary,
            "formats": list(cls.formats), "allocator": cls.default_allocator, "options": defaults,
        })  # fmt: skip
    bases = [
        {"name": name, "example": BASES.get(name).example, "paper": BASES.get(name).paper} for name in BASES.names()
    ]
    if json_file is not None:
        o.write_result(json_file, {"methods": rows, "allocators": ALLOCATORS.names(), "bases": bases})
        return
    table = Table(title="methods (the first format is the default)")
    for column in ("name", "what it does", "paper", "formats", "allocator", "options"):
        table.add_column(column, overflow="fold")
    for row in rows:
        options = "\n".join(f"{key}={value}" for key, value in row["options"].items())
        table.add_row(row["name"], row["summary"], row["paper"], " ".join(row["formats"]), row["allocator"], options)
    console().print(table)
    typer.echo(f"allocators: {', '.join(ALLOCATORS.names())}")
    typer.echo(f"bases of eora: {', '.join(base['example'] for base in bases)}")
