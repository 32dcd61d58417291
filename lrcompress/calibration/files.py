"""Files of text and of records: plain, one JSON value a line, JSON arrays, tables, each also packed by gzip."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrcompress.errors import InputError

GZIP = ".gz"
LINES, ARRAYS, PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet",)
TABLES = {".csv": ",", ".tsv": "\t"}
"""Suffix to what stands between two fields."""
_RECORDS = (*LINES, *ARRAYS, *PARQUET, *TABLES)


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, in small letters; that of gzip does not."""
    name = path.name.lower()
    return Path(name.removesuffix(GZIP)).suffix


def holds_records(path: Path) -> bool:
    """Whether a file of this name holds records with fields, not text as it is."""
    return kind_of(path) in _RECORDS


def read_text(path: Path, *, newline: str | None = "") -> str:
    """The UTF-8 text of a file, without a byte order mark; InputError where it cannot be read or is none."""
    try:
        if path.name.lower().endswith(GZIP):
            with gzip.open(path, "rt", encoding="utf-8-sig", newline=newline) as packed:
                return packed.read()
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_records(path: Path, wanted: Sequence[str] = ()) -> list[Any]:
    """The records of a file; InputError where it holds none.

    Of a .parquet that has the first of the columns `wanted`, these alone are read.
    """
    kind = kind_of(path)
    try:
        if kind in PARQUET:
            return _parquet_rows(path, wanted)
        if kind in TABLES:
            return _table_rows(read_text(path), TABLES[kind])
        text = read_text(path, newline=None)
        return _array(text) if kind in ARRAYS else _lines(text)
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _lines(text: str) -> list[Any]:
    # Lines end where JSON's do: str.splitlines also breaks at characters that a string may hold as they are.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _array(text: str) -> list[Any]:
    """Of a .json: an array's values, one object alone, or one value a line, which is often called so."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            return _lines(text)
        except json.JSONDecodeError:
            raise error from None
    return found if isinstance(found, list) else [found]


def _table_rows(text: str, delimiter: str) -> list[dict[str, str]]:
    """Of a table whose first row names the fields; ValueError where a row has more or fewer of them."""
    longest = csv.field_size_limit(max(len(text), 1))  # of the whole process: a text may be longer than its default
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = next(rows, [])
        found = []
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(f"the row that ends in line {rows.line_num} has {len(row)} fields of {len(names)}")
            if row:
                found.append(dict(zip(names, row, strict=True)))
        return found
    finally:
        csv.field_size_limit(longest)


def _parquet_rows(path: Path, wanted: Sequence[str]) -> list[dict[str, Any]]:
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(path).names
    chosen = [name for name in wanted if name in names] if names and wanted and wanted[0] in names else names
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, columns=chosen).to_pylist()
    return rows
