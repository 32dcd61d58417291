"""Sparklines of the terminal."""

import pytest

from lrcompress.report.inspection import SPARKS, removed_by_block, sparkline


def target(name, stored, dense=100):
    return {"name": name, "bytes": stored, "dense_bytes": dense}


def test_a_sparkline_rises_with_its_values_and_stays_in_its_bars():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▂▃▄▅▆▇██"
    assert sparkline([0.0, -0.3, 1.0]) == SPARKS[0] * 2 + SPARKS[-1]
    assert sparkline([0.5, 0.25], top=1.0) == SPARKS[4] + SPARKS[2]
    assert sparkline([0.0, 0.0]) == sparkline([-1.0, -2.0]) == SPARKS[0] * 2


def test_removed_by_block_counts_bytes_in_the_order_of_the_blocks():
    targets = [
        target("m.layers.10.up", 25), target("m.layers.2.up", 50), target("m.layers.2.up", 0, 300),
        target("m.layers.2.down", 10), target("lm_head", 10),
    ]  # fmt: skip
    assert removed_by_block(targets) == {"up": pytest.approx([1 - 50 / 400, 0.75])}
