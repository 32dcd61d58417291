"""What progress says is left: of the whole run where its phases are known, never nothing while more comes."""

import re

import pytest

from lrcompress.report import progress
from lrcompress.report.progress import Reporter, duration


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only a test lets pass; every step is worth a line."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.0)
    return now


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(Reporter, "say", lambda self, line: lines.append(line))
    return lines


def steps(reporter, clock, title, total, seconds):
    with reporter.phase(title, total) as tick:
        for _ in range(total):
            clock[0] += seconds
            tick()


def left(line):
    return float(re.search(r"about (\d+) s left in all", line)[1])


def test_what_is_left_is_of_the_whole_run(clock, said):
    """Every phase takes twice what was predicted: so will those to come."""
    reporter = Reporter()
    reporter.expect({"one": 10.0, "two": 20.0, "three": 5.0})
    steps(reporter, clock, "one", 4, 5.0)
    assert [left(line) for line in said] == [65, 60, 55, 50]
    said.clear()
    steps(reporter, clock, "two", 2, 20.0)
    assert [left(line) for line in said] == [30, 10]
    said.clear()
    steps(reporter, clock, "three", 2, 5.0)
    assert left(said[0]) == 5
    assert said[1] == "three: 2/2, 10 s"


def test_a_phase_that_nobody_foretold_speaks_for_itself_alone(clock, said):
    steps(Reporter(), clock, "bench", 4, 3.0)
    assert said[0] == "bench: 1/4, 3 s, 9 s left in this step"
    assert said[-1] == "bench: 4/4, 12 s"


def test_steps_of_an_earlier_run_make_none_of_this_one_faster(clock, said):
    reporter = Reporter()
    reporter.expect({"one": 100.0, "two": 10.0})
    with reporter.phase("one", 10) as tick:
        tick.skip(8)
        clock[0] += 10.0
        tick()
    assert said[0] == "one: 8/10, 0 s"
    assert left(said[1]) == 20


def test_what_is_left_out_is_not_waited_for(clock, said):
    reporter = Reporter()
    reporter.expect({"one": 10.0, "two": 90.0, "three": 10.0})
    reporter.expect_no("one", "two")
    steps(reporter, clock, "one", 2, 1.0)
    assert said[0].endswith("1 s left in this step")
    steps(reporter, clock, "three", 2, 5.0)
    assert left(said[2]) == 5


def test_a_bar_says_the_same(clock):
    import io

    from rich.console import Console

    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    reporter.expect({"one": 10.0, "two": 90.0})
    steps(reporter, clock, "one", 2, 5.0)
    assert "about 90 s left in all" in reporter.console.file.getvalue()


def test_durations():
    assert duration(179) == "179 s"
    assert duration(600) == "10 min"
