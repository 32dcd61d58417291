"""Calibration statistics between runs: the same bytes without a calibration, and nothing that belongs to another text."""

import shutil

import pytest
from transformers import AutoTokenizer

from lrcompress.checkpoint.cache import clear, entries
from lrcompress.errors import Interrupted
from lrcompress.pipeline import compress
from lrcompress.recipe import Sweep, make_recipe, validated
from lrcompress.report import summary
from lrcompress.stages.profile import Artefacts
from lrcompress.sweep import sweep
from tests.conftest import compress_tiny


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def walks(monkeypatch):
    """How many calibration samples went through a block, forward or backward."""
    from lrcompress.calibration import collect, gradients
    from lrcompress.stages import backward, profile

    counts = {"forward": 0, "backward": 0}
    forward, back = collect.walk_block, gradients.backward_block

    def counted_forward(*args):
        before = args[3]
        counts["forward"] += 0 if "held-out" in before.path.name else len(before)
        return forward(*args)

    def counted_back(*args, **kwargs):
        counts["backward"] += 1
        return back(*args, **kwargs)

    monkeypatch.setattr(profile, "walk_block", counted_forward)
    monkeypatch.setattr(backward, "backward_block", counted_back)
    return counts


def same_weights(one, two):
    names = {path.name for path in one.folder.glob("*.safetensors")}
    assert names
    assert all((one.folder / name).read_bytes() == (two.folder / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lord"},
        {"name": "auto", "propagation": "sequential", "toward_dense": 0.5},
        {"name": "cospadi", "metric": "trace"},
    ],
)
@pytest.mark.parametrize("target", [[], ["lm_head", "*.q_proj", "*.down_proj"]])
def test_the_second_run_reads_no_text_and_writes_the_same_bytes(llama, tmp_path, monkeypatch, walks, method, target):
    plain = compress_tiny(llama, tmp_path / "plain", method=method, ratio=0.4, target=target)
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    first = compress_tiny(llama, tmp_path / "first", method=method, ratio=0.4, target=target)
    same_weights(plain, first)
    assert walks["forward"] > 0
    walks.update(forward=0, backward=0)
    second = compress_tiny(llama, tmp_path / "second", method=method, ratio=0.4, target=target)
    same_weights(plain, second)
    if method.get("propagation") != "sequential":
        assert walks == {"forward": 0, "backward": 0}
    assert walks["backward"] == 0
    assert [entry.kind for entry in entries()] == ["statistics"]
    clear()
    assert not entries()


def test_methods_and_ratios_share_what_is_equal(llama, tmp_path, monkeypatch, cache, walks):
    compress_tiny(llama, tmp_path / "a", method="lord", ratio=0.2)
    walks["forward"] = 0
    compress_tiny(llama, tmp_path / "b", method="welore", ratio=0.5)
    assert walks["forward"] == 0
    for change in (
        {"calibration": {"source": "python-docs", "samples": 3, "seqlen": 64}},
        {"method": {"name": "lord", "sink_share": 0.0}},
        {"target": ["*.q_proj"]},
    ):
        walks["forward"] = 0
        compress_tiny(llama, tmp_path / "c", **change)
        assert walks["forward"] > 0
        shutil.rmtree(tmp_path / "c")
    version = summary.version
    monkeypatch.setattr(summary, "version", lambda name: "0" if name == "transformers" else version(name))
    walks["forward"] = 0
    compress_tiny(llama, tmp_path / "d")
    assert walks["forward"] > 0


def test_a_cache_that_cannot_be_written_costs_time_only(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    assert compress_tiny(llama, tmp_path / "out").report["ratio"]["stored"] >= 0.2


@pytest.mark.parametrize("method", ["lord", "auto"])
@pytest.mark.parametrize("forget", ["folder", "entries"])
def test_a_run_that_loses_its_statistics_is_resumed_with_the_same_bytes(
    llama, tmp_path, monkeypatch, cache, method, forget
):
    """What a run with known statistics leaves of hidden states holds no calibration sample."""
    whole = compress_tiny(llama, tmp_path / "whole", method=method)
    recipe = make_recipe({**whole.report["recipe"], "output": str(tmp_path / "out")})
    save, calls = Artefacts.save, iter(range(10))

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Artefacts, "save", interrupted)
        with pytest.raises(Interrupted):
            compress(recipe)
    if forget == "folder":
        monkeypatch.delenv("LRCOMPRESS_CACHE")
    else:
        clear()
    same_weights(whole, compress(recipe, resume=True))


def test_a_second_run_without_held_out_text_has_nothing_to_walk(llama, tmp_path, cache):
    tokenizer, source = AutoTokenizer.from_pretrained(llama), tmp_path / "short.txt"
    source.write_text(tokenizer.decode(tokenizer("the cat sat on the mat, " * 200).input_ids[:600]))
    calibration = {"source": str(source), "samples": 4, "seqlen": 64}
    first = compress_tiny(llama, tmp_path / "first", calibration=calibration)
    same_weights(first, compress_tiny(llama, tmp_path / "second", calibration=calibration))


def test_a_sweep_walks_once_for_methods_of_the_same_statistics(llama, tmp_path, walks):
    both = {
        "model": str(llama), "methods": ["lord", {"name": "welore", "format": "low_rank"}], "ratios": [0.4],
        "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64}, "output": str(tmp_path / "both"),
        "evaluate": {"tasks": ["tokens:python-docs@64"], "limit": 1},
    }  # fmt: skip
    sweep(validated(Sweep, {**both, "methods": ["lord"], "output": str(tmp_path / "one")}, "test"))
    once = walks["forward"]
    assert once > 0
    walks.update(forward=0)
    sweep(validated(Sweep, both, "test"))
    assert walks["forward"] == once
    assert not (tmp_path / "both/scratch").exists()


@pytest.mark.parametrize(("writer", "reader"), [("float64", "float32"), ("float32", "float64")])
def test_sums_of_one_precision_are_read_by_the_other(llama, tmp_path, monkeypatch, cache, walks, writer, reader):
    asked = {"method": {"name": "lord", "metric": "two_sided", "join": "auto"}, "ratio": 0.3}
    monkeypatch.setenv("LRCOMPRESS_WIDE", writer)
    first = compress_tiny(llama, tmp_path / "first", **asked)
    walks.update(forward=0, backward=0)
    monkeypatch.setenv("LRCOMPRESS_WIDE", reader)
    second = compress_tiny(llama, tmp_path / "second", **asked)
    assert walks == {"forward": 0, "backward": 0}
    errors = [[target["relative_error"] for target in run.report["targets"]] for run in (first, second)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
