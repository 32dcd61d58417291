"""lrcompress methods"""

import textwrap
from typing import Any

import typer

from lrcompress.cli import options as o

WIDTH = 80


def methods(json_file: o.Json = None) -> None:
    """List the methods: paper, metric, formats, allocator, options with defaults; allocators and bases."""
    from lrcompress.allocators import ALLOCATORS
    from lrcompress.bases import BASES
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
    for row in rows:
        typer.echo(textwrap.fill(f"{row['name']}: {row['summary']}", WIDTH, subsequent_indent="  "))
        options = " ".join(f"{key}={value}" for key, value in row["options"].items())
        formats = ", ".join(row["formats"]) + (" (the first is the default)" if len(row["formats"]) > 1 else "")
        for what, said in (
            ("paper", row["paper"]),
            ("formats", formats),
            ("allocator", row["allocator"]),
            ("options", options),
        ):
            typer.echo(textwrap.fill(said, WIDTH, initial_indent=f"  {what:10}", subsequent_indent=" " * 12))
    for what, names in (("allocators", ALLOCATORS.names()), ("bases of eora", [base["example"] for base in bases])):
        typer.echo(textwrap.fill(f"{what}: {', '.join(names)}", WIDTH, subsequent_indent="  ", break_on_hyphens=False))
