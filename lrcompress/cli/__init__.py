"""The command line: one Typer command per file; each parses, builds a recipe, calls the library and prints."""

from lrcompress.cli.app import main

__all__ = ["main"]
