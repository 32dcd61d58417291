"""Expectations: `METRIC <= NUMBER`, `TASK:METRIC <= 1.3 * against`, `bytes <= 200MB`."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lrcompress.budget import parse_size
from lrcompress.errors import InputError, nearest

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(r"^\s*(?P<left>\S+?)\s*(?P<op><=|>=|<|>)\s*(?P<right>.+?)\s*$")
_FACTOR = re.compile(r"^(?:(?P<factor>[0-9.eE+-]+)\s*\*\s*)?against$")

Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Expectation:
    """A parsed expectation: the limit is `number`, times the reference model's value where `relative`."""

    expression: str
    task: str | None
    metric: str
    operator: str
    number: float
    relative: bool


def parse_expectation(text: str) -> Expectation:
    """InputError where the form is not understood."""
    match = _FORM.match(text)
    if match is None:
        raise InputError(f"expectation {text!r} is not understood: write METRIC <= NUMBER or METRIC <= 1.3 * against")
    task, _, metric = match["left"].rpartition(":")
    right = match["right"]
    factor = _FACTOR.match(right)
    try:
        if factor:
            number = float(factor["factor"] or 1.0)
        elif metric in ("bytes", "rss_bytes"):
            number = float(parse_size(right))
        elif right.endswith("%"):
            number = float(right[:-1]) / 100
        else:
            number = float(right)
    except ValueError as error:
        raise InputError(f"expectation {text!r}: {right!r} is no number") from error
    if not math.isfinite(number):
        raise InputError(f"expectation {text!r}: {right!r} is no finite number")
    return Expectation(text, task or None, metric, match["op"], number, bool(factor))


def judge(
    expectation: Expectation, results: Results, facts: dict[str, float], against: Results | None
) -> dict[str, Any]:
    """An entry of `expectations` in the JSON; facts are stored_ratio, bytes and the like.

    A metric that was not measured, or is ambiguous, is an InputError.
    """
    expectation = _meant(expectation, results, facts)
    if expectation.task is None and expectation.metric in facts:
        value, reference = facts[expectation.metric], None
    else:
        task = _task(expectation, results, facts)
        value = results[task][expectation.metric]
        reference = None if against is None else against.get(task, {}).get(expectation.metric)
    limit = expectation.number
    if expectation.relative:
        if reference is None:
            raise InputError(
                f"expectation {expectation.expression!r} needs --against, or a metric that both models have"
            )
        limit *= reference
    met = _OPERATORS[expectation.operator](value, limit)
    return {"expression": expectation.expression, "value": value, "limit": limit, "met": met}


def _meant(expectation: Expectation, results: Results, facts: dict[str, float]) -> Expectation:
    """`perplexity` is the one metric that ends so, as token_perplexity, where nothing is called `perplexity`."""
    tasks = [metrics for task, metrics in results.items() if expectation.task in (None, task)]
    known = {metric for metrics in tasks for metric in metrics}
    longer = {metric for metric in known if metric.endswith(f"_{expectation.metric}")}
    if expectation.metric in known | facts.keys() or len(longer) != 1:
        return expectation
    return replace(expectation, metric=longer.pop())


def _task(expectation: Expectation, results: Results, facts: dict[str, float]) -> str:
    having = [task for task, metrics in results.items() if expectation.metric in metrics]
    if expectation.task is not None:
        having = [task for task in having if task == expectation.task]
    if len(having) > 1:
        raise InputError(
            f"expectation {expectation.expression!r}: several tasks have {expectation.metric} "
            f"({', '.join(having)}): write TASK:METRIC"
        )
    if not having:
        known = sorted({m for metrics in results.values() for m in metrics} | set(facts))
        name = f"{expectation.task}:{expectation.metric}" if expectation.task else expectation.metric
        raise InputError(f"expectation {expectation.expression!r}: {name} was not measured: {nearest(name, known)}")
    return having[0]
