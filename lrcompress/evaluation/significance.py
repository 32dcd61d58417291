"""Whether two models differ on the same items, or only seem to: paired tests."""

from collections.abc import Sequence
from typing import Any

LEVEL = 0.05
"""A smaller p-value is called significant."""


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """McNemar's exact test on answers that are right (1) or wrong (0), item by item."""
    from scipy.stats import binomtest

    won = sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
    return _entry(binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0, len(ours))


def paired_t(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any] | None:
    """Student's paired test of two or more values; None for fewer."""
    from scipy.stats import ttest_1samp

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return None
    # Without any spread the statistic is 0/0 where the values are equal, infinite where they are not.
    if len(set(differences)) == 1:
        return _entry(float(differences[0] == 0), len(differences))
    return _entry(ttest_1samp(differences, 0.0).pvalue, len(differences))


def mcnemar_tests(ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]]) -> dict[str, dict[str, Any]]:
    """McNemar's test of every metric that calls single items right or wrong; items are matched by their ids."""
    tests = {}
    for metric in ours.keys() & theirs.keys():
        a, b = ours[metric], theirs[metric]
        common = sorted(a.keys() & b.keys())
        if common and {a[i] for i in common} | {b[i] for i in common} <= {0.0, 1.0}:
            tests[metric] = mcnemar([a[i] for i in common], [b[i] for i in common])
    return dict(sorted(tests.items()))


def _entry(p_value: float, count: int) -> dict[str, Any]:
    return {"p_value": float(p_value), "significant": bool(p_value < LEVEL), "n": count}
