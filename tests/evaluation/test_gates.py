"""Expectations: parsing and judging."""

import pytest

from lrcompress.errors import InputError
from lrcompress.evaluation.gates import judge, parse_expectation

RESULTS = {"tokens:a.txt@64": {"token_perplexity": 12.0}, "arc": {"acc": 0.5}, "piqa": {"acc": 0.6}}
AGAINST = {"tokens:a.txt@64": {"token_perplexity": 10.0}, "arc": {"acc": 0.55}, "piqa": {"acc": 0.6}}
FACTS = {"stored_ratio": 0.2, "bytes": 1.5e6}


@pytest.mark.parametrize(
    ("text", "limit", "met"),
    [
        ("token_perplexity <= 12", 12.0, True),
        ("perplexity <= 12", 12.0, True),
        ("tokens:a.txt@64:perplexity <= 1.3 * against", 13.0, True),
        ("token_perplexity<11.9", 11.9, False),
        ("token_perplexity <= 1e9", 1e9, True),
        ("token_perplexity <= 1.3 * against", 13.0, True),
        ("token_perplexity <= 1.1*against", 11.0, False),
        ("token_perplexity > against", 10.0, True),
        ("arc:acc >= 0.9 * against", 0.495, True),
        ("tokens:a.txt@64:token_perplexity <= 11", 11.0, False),
        ("stored_ratio >= 0.2", 0.2, True),
        ("stored_ratio >= 20%", 0.2, True),
        ("bytes <= 2MB", 2e6, True),
        ("bytes <= 1.4MB", 1.4e6, False),
    ],
)
def test_judging(text, limit, met):
    entry = judge(parse_expectation(text), RESULTS, FACTS, AGAINST)
    assert entry["limit"] == pytest.approx(limit)
    assert entry["met"] is met


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acc",
        "acc = 3",
        "acc <= many",
        "bytes <= 3 parsecs",
        "acc <= * against",
        "acc <= nan",
        "acc <= 1e999",
        "acc >= inf * against",
        "acc > -inf%",
    ],
)
def test_what_is_not_understood(text):
    with pytest.raises(InputError, match="expectation|size"):
        parse_expectation(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("acc >= 0.1", "several tasks"), ("accuracy >= 0.1", "was not measured"), ("piqa:f1 >= 0.1", "was not measured")],
)
def test_what_cannot_be_judged(text, message):
    with pytest.raises(InputError, match=message):
        judge(parse_expectation(text), RESULTS, FACTS, AGAINST)


def test_against_needs_a_second_model():
    with pytest.raises(InputError, match="--against"):
        judge(parse_expectation("arc:acc >= against"), RESULTS, FACTS, None)


def test_a_short_name_of_several_metrics_is_none():
    results = {"a": {"token_perplexity": 1.0, "word_perplexity": 2.0}}
    with pytest.raises(InputError, match="perplexity was not measured"):
        judge(parse_expectation("perplexity <= 3"), results, FACTS, None)
