"""What an evaluation measured, in tables."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


def metric_rows(evaluation: dict[str, Any]) -> list[str]:
    """A Markdown table of the metrics, beside those of the model compared with."""
    against = (evaluation.get("against") or {"model": ""})["model"]
    head = ["task", "metric", "this", against or "dense", "paired test"]
    rows = [[row.measured, row.metric, row.shown, row.other_shown, row.test_shown] for row in measurements(evaluation)]
    return [_table_row(head), "|---|---|---|---|---|", *map(_table_row, rows)]


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(table_cell, cells))} |"


def table_cell(text: str) -> str:
    """A text that ends no cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


@dataclass(frozen=True)
class Measurement:
    """A metric of a task with its standard error; other: that of the model compared with; test: the paired test."""

    task: str
    metric: str
    value: float
    error: float | None
    other: float | None
    other_error: float | None
    test: dict[str, Any] | None
    of: str
    """How much text or how many questions were measured, "" where that is not known."""

    @property
    def measured(self) -> str:
        """The task, and on how much of it."""
        return f"{self.task} ({self.of})" if self.of else self.task

    @property
    def shown(self) -> str:
        """The value, and its error where there is one."""
        return _with_error(self.value, self.error)

    @property
    def other_shown(self) -> str:
        """As `shown`; empty where the other model lacks the metric."""
        return "" if self.other is None else _with_error(self.other, self.other_error)

    @property
    def test_shown(self) -> str:
        """The p-value, and what it says; empty where there is no test."""
        if self.test is None:
            return ""
        return f"{self._p_value}, {'significant' if self.test['significant'] else 'not significant'}"

    @property
    def differs(self) -> str:
        """Whether the models differ by more than chance, and the p-value, in few letters; empty without a test."""
        if self.test is None:
            return ""
        return f"{'yes' if self.test['significant'] else 'no'}, {self._p_value}"

    @property
    def _p_value(self) -> str:
        assert self.test is not None
        value = self.test["p_value"]
        return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def measurements(evaluation: dict[str, Any]) -> Iterator[Measurement]:
    """What an evaluation measured, counts left out."""
    against = evaluation.get("against") or {"results": {}}
    for task, metrics in evaluation["results"].items():
        other, tests = against["results"].get(task, {}), against.get("tests", {}).get(task, {})
        for metric, value in metrics.items():
            if isinstance(value, float) and not is_error(metric, metrics):
                error = _error_name(metric)
                yield Measurement(
                    task, metric, value, _number(metrics, error), _number(other, metric), _number(other, error),
                    tests.get(metric), _amount(metrics),
                )  # fmt: skip


def _amount(metrics: dict[str, Any]) -> str:
    for name in ("blocks", "samples"):
        if isinstance(count := metrics.get(name), int):
            return f"{count} {name if count != 1 else name[:-1]}"
    return ""


def _number(metrics: dict[str, Any], name: str) -> float | None:
    found = metrics.get(name)
    return found if isinstance(found, float) else None


def is_error(metric: str, metrics: Collection[str]) -> bool:
    """Whether a metric is the standard error of another one."""
    return any(metric == _error_name(name) for name in metrics)


def _error_name(metric: str) -> str:
    return f"{metric}_stderr"


def _with_error(value: float, error: float | None) -> str:
    shown = f"{value:.4f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"
    return shown if error is None else f"{shown} ±{error:.4f}"
