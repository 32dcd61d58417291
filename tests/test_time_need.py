"""The predicted time of a run: in proportion to its work, and near what blocks of known shape took."""

import pytest
import torch

from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages import time_need
from lrcompress.stages.opening import open_request
from lrcompress.stages.request import check_request
from lrcompress.stages.time_need import seconds_need
from tests.conftest import compress_tiny, needs_demo
from tests.test_benchmarks import benchmark

RATES = {torch.float32: 51e9, torch.float64: 21.5e9}


def opened(model, samples=8, seqlen=64, **changes):
    calibration = {"source": "python-docs", "samples": samples, "seqlen": seqlen}
    asked = {"model": str(model), "ratio": 0.2, "output": "nowhere", "calibration": calibration, **changes}
    return open_request(check_request(make_recipe(asked)), Reporter(quiet=True), calibrate=False)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    monkeypatch.setattr(time_need, "rate", lambda dtype, device: RATES[dtype])


@pytest.fixture
def only_operations(monkeypatch):
    monkeypatch.setattr(time_need, "PER_WEIGHT", 0.0)


def test_what_costs_more_is_predicted_to_take_longer(llama, only_operations):
    def seconds(size=1, **changes):
        return seconds_need(opened(llama, **changes), size)

    once = seconds(method="lord")
    assert seconds(method="lord", samples=16) > 1.3 * once
    assert seconds(method="lord", samples=16) < 2 * once
    assert seconds(method="welore") > once
    sequential = {"name": "lord", "propagation": "sequential"}
    alone, twice = (seconds(method=sequential, allocator=name) for name in ("uniform", "marginal_error"))
    assert 1.2 * once < alone < twice - 0.5 * once  # the dense model's own pass comes before only where it is needed
    assert seconds(2, method="lord") < 0.75 * once
    assert seconds(method={"name": "ecsq", "metric": "input"}, bpw=3, ratio=None) < seconds(
        method="auto", bpw=3, ratio=None
    )
    searched = seconds(method="auto", max_loss="2%", ratio=None)
    assert 1.2 < searched / seconds(method="auto", bpw=3, ratio=None) < time_need.CANDIDATES


def test_block_types_are_looked_for_one_by_one(llama, only_operations):
    def seconds(**changes):
        return seconds_need(opened(llama, ratio=None, **changes))

    shapes = [site.shape for site in opened(llama, method="lord").sites]
    several, one = seconds(method="ggml", bpw=5), seconds(method="ggml", type="Q8_0")
    assert several - one > sum(28 * m * n * (3 * n + m) for m, n in shapes) / RATES[torch.float32]
    one_side = seconds(method={"name": "ggml", "metric": "input"}, type="Q8_0")
    assert one - one_side > sum(28 * m * m * n for m, n in shapes) / RATES[torch.float32]


@needs_demo
@pytest.mark.demo
@pytest.mark.slow
def test_a_gguf_whose_time_was_measured():
    """Seconds of the processor for Q4_K_M of 48 x 1024 tokens, on two threads (docs/gguf.md)."""
    asked = opened("demo", samples=48, seqlen=1024, method="ggml", type="Q4_K_M", ratio=None)
    assert seconds_need(asked) == pytest.approx(1018, rel=0.3)


@needs_demo
@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "measured"), [({"method": "lord"}, 63.3), ({"method": "auto", "bpw": 3, "ratio": None}, 180.3)]
)
def test_the_demo_whose_time_was_measured(changes, measured):
    """Seconds of 8 x 1024 tokens, by one thread of the same machine with another one busy."""
    assert seconds_need(opened("demo", seqlen=1024, **changes)) == pytest.approx(measured, rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"method": "lord"}, 49.8),
        ({"method": "welore"}, 66.0),
        ({"method": "eora", "base": "gptq:4:64", "rank": 32, "ratio": None}, 90.0),
        ({"method": "auto", "bpw": 3, "ratio": None}, 119.0),
    ],
)
def test_blocks_whose_time_was_measured(tmp_path, changes, measured):
    """Seconds of the processor from docs/speed.md, hidden 2048, MLP 8192, 8 x 1024 tokens; RATES are that machine's."""
    model = benchmark("memory").generate(tmp_path / "wide", 2048, 8192, 1, 32000)
    assert seconds_need(opened(model, seqlen=1024, **changes)) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"method": "lord"}, {"calibrate and decompose"}),
        ({"method": "auto", "ratio": None, "bpw": 3}, {"forward", "backward and decompose", "encode"}),
        ({"method": {"name": "lord", "propagation": "sequential"}}, {"propagate and decompose"}),
    ],
)
def test_phases_are_predicted_by_the_titles_that_they_have(llama, tmp_path, monkeypatch, changes, longest):
    """Every phase of a run knows what is left of the whole run, but for the last step of all."""
    ran, foretold = [], {}
    phase = Reporter.phase

    def noted(self, title, total):
        ran.append(title)
        foretold.update(self.expected)
        return phase(self, title, total)

    monkeypatch.setattr(Reporter, "phase", noted)
    compress_tiny(llama, tmp_path / "out", **changes)
    assert set(ran) == set(foretold)
    assert longest | {"write"} <= set(ran)
    assert ran == [title for title in foretold if title in ran]
