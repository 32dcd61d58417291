"""What a stored format costs in use: bits counted by hand, speed by a clock of our own, kept between runs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.coding import estimated_bits
from lrcompress.evaluation import in_use as module
from lrcompress.evaluation.in_use import measured, planned_in_use, random_codes, stored_in_use
from lrcompress.formats import restored
from lrcompress.kernels.native import library
from lrcompress.pipeline import make_plan
from lrcompress.protocols import Spec
from tests.conftest import compress_tiny
from tests.test_pipeline import recipe


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "CROWD", 2**16)
    monkeypatch.setattr(module, "SECONDS", 0.0)


def low_rank(dtype=torch.bfloat16):
    spec = Spec("low_rank", (64, 32), True, parameters={"rank": 4})
    stored = {"A.weight": torch.randn(4, 32), "B.weight": torch.randn(64, 4), "B.bias": torch.randn(64)}
    return restored(spec, stored, dtype)


def test_bits_are_those_of_what_is_held_and_speed_is_that_of_the_clock(monkeypatch):
    now = [0.0]

    def costs(seconds, real):
        def run(*arguments):
            now[0] += seconds
            return real(*arguments)

        return run

    layer = low_rank()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(module.nn, "functional", SimpleNamespace(linear=costs(3.0, nn.functional.linear)))
    identity = costs(2.0, lambda x: x)
    monkeypatch.setattr(type(layer), "forward", lambda self, x: identity(x))
    bits, speed = measured(layer, torch.bfloat16)
    assert bits == 16 * 4 * (64 + 32) / (64 * 32)
    assert speed == 1.5


@pytest.mark.parametrize("bits", [2.5, 4.0, 6.0])
def test_random_codes_have_the_bits_asked_for(bits):
    spec, stored = random_codes((512, 256), bits)
    assert spec.parameters["length"] == len(stored["stream"])
    assert 8 * len(stored["stream"]) / (512 * 256) == pytest.approx(bits, rel=0.08)
    codes = restored(spec, stored, torch.float32).integers()
    assert estimated_bits(codes) / codes.numel() == pytest.approx(bits, rel=0.08)


def test_a_compressed_checkpoint_and_its_plan_say_it_and_it_is_measured_once(llama, tmp_path, monkeypatch):
    asked = {"method": "auto", "ratio": None, "bpw": 4.0}
    result = compress_tiny(llama, tmp_path / "out", **asked)
    found = stored_in_use(result.report, result.folder)
    largest = max(t["shape"][0] * t["shape"][1] for t in result.report["targets"])
    assert (found.format, found.shape[0] * found.shape[1]) == ("coded", largest)
    assert found.bits > (4 if library("tiles") else 8)
    assert f"in memory {found.bits:.1f} bits a weight, decoding about {found.speed:.1f} × dense" in str(found)
    planned = planned_in_use(make_plan(recipe(llama, **asked)))
    monkeypatch.setattr(module, "measured", lambda *_: pytest.fail("was measured again"))
    assert stored_in_use(result.report, result.folder) == found
    assert planned_in_use(make_plan(recipe(llama, **asked))) == planned


def test_nothing_is_said_where_nothing_is_known(llama, tmp_path, monkeypatch):
    result = compress_tiny(llama, tmp_path / "out", method="lord", ratio=0.4, format="low_rank")
    plan = make_plan(recipe(llama, method="lord", ratio=0.4, format="low_rank"))
    assert planned_in_use(plan) is None
    found = stored_in_use(result.report, result.folder)
    assert planned_in_use(plan) == found
    assert read_manifest(result.folder).modules
    assert planned_in_use({**plan, "targets": [{**t, "format": "dense"} for t in plan["targets"]]}) is None
    assert stored_in_use({**result.report, "targets": []}, result.folder) is None
