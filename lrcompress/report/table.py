"""The points of a sweep as a table."""

import csv
import io
from typing import Any

COLUMNS = ("method", "ratio", "seed", "stored_ratio", "bpw", "bytes", "seconds")
"""Of the CSV, before what was measured."""


def as_csv(result: dict[str, Any]) -> str:
    """A row per point, a column per metric; the dense model first."""
    metrics = metrics_of(result)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*COLUMNS, *map(":".join, metrics)])
    for row in [result["dense"], *result["points"]]:
        values = [row["results"].get(task, {}).get(key, "") for task, key in metrics]
        writer.writerow([*(row.get(key, "") for key in COLUMNS), *values])
    return out.getvalue()


def metrics_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(task, metric) of all that was measured, the dense model's first."""
    rows = [result["dense"], *result["points"]]
    return list(dict.fromkeys((task, key) for r in rows for task, values in r["results"].items() for key in values))
