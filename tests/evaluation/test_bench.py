"""bench: what is counted against closed forms, what is timed against a clock of our own."""

import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.cli.app import app
from lrcompress.errors import InputError, ResourceError
from lrcompress.evaluation import bench as module
from lrcompress.evaluation import footprint as footprints
from lrcompress.evaluation.bench import BenchSpec, bench, spread
from lrcompress.evaluation.bounds import counted
from lrcompress.evaluation.footprint import Footprint, footprint
from lrcompress.kernels.products import COMPILED, DENSE_PRODUCT
from tests.commands import run_cli

KERNEL = COMPILED if shutil.which("cc") else DENSE_PRODUCT
"""What multiplies one row by a factor."""

SMALL = BenchSpec(batches=(1, 3), contexts=(8,), new_tokens=4, repeats=2)
OPTIONS = {"device": "cpu", "dtype": "auto", "trust_remote_code": False}


@pytest.fixture
def compressed(compressed):
    return compressed(method={"name": "lord", "metric": "plain"}, format="low_rank", ratio=0.4)


@pytest.fixture
def light(monkeypatch):
    """Processes of their own take seconds; the tests of footprint start them."""
    monkeypatch.setattr(module, "footprint", lambda label, **_: Footprint(2.0, 10**6 * len(str(label))))


class Clock:
    """Time that passes only while a model runs: a second a call of `slow`, half of it for the others."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def watch(self, model, name, seconds):
        forward = model.forward

        def timed(*args, **kwargs):
            self.now += seconds
            self.calls.append((name, kwargs["input_ids"].shape[1]))
            return forward(*args, **kwargs)

        timed.__signature__ = inspect.signature(forward)
        model.forward = timed


@pytest.fixture
def clock(monkeypatch, light, llama):
    clock, load = Clock(), module.load_network

    def loading(label, **options):
        folder, model = load(label, **options)
        dense = label == str(llama)
        clock.watch(model, "dense" if dense else "compressed", 1.0 if dense else 0.5)
        return folder, model

    monkeypatch.setattr(module, "load_network", loading)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_rows_are_what_the_clock_says(clock, llama, compressed):
    result = bench(str(compressed), SMALL, str(llama))
    assert [(row["phase"], row["batch"], row["context"]) for row in result["rows"]] == [
        ("prefill", 1, 8), ("decode", 1, 8), ("prefill", 3, 8), ("decode", 3, 8),
    ]  # fmt: skip
    for row in result["rows"]:
        per_call = row["batch"] * (8 if row["phase"] == "prefill" else 1)
        assert row["dense_tokens_per_s"] == per_call
        assert row["compressed_tokens_per_s"] == 2 * per_call
        assert (row["speedup"], row["spread"]) == (2.0, 0.0)
        first = (1.0, 0.5) if row["phase"] == "prefill" else (None, None)
        assert (row["dense_first_token_seconds"], row["compressed_first_token_seconds"]) == first


def test_the_models_take_turns_and_decode_over_the_cache(clock, llama, compressed):
    bench(str(compressed), BenchSpec((1,), (8,), new_tokens=2, repeats=3), str(llama))
    warm_up = [("dense", 8), ("dense", 1), ("compressed", 8), ("compressed", 1)]
    dense, other = [("dense", 8), ("dense", 1), ("dense", 1)], [("compressed", 8), *2 * [("compressed", 1)]]
    assert clock.calls == [*warm_up, *dense, *other, *other, *dense, *dense, *other]


def test_the_loop_writes_what_generate_does(llama):
    """The greedy tokens are those of transformers, so the loop does a decoder's whole work."""
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = torch.randint(320, (2, 8), generator=torch.Generator().manual_seed(0))
    seen, forward = [], model.forward

    def watched(**kwargs):
        seen.append(kwargs["input_ids"])
        return forward(**kwargs)

    runner = module._Runner(llama, model, {"use_cache": True}, watched)
    module._once(runner, ids, 6)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=None
    )
    assert torch.equal(torch.cat(seen, dim=1)[:, :14], made)


def test_bounds_are_those_of_the_shapes(light, llama, compressed):
    result = bench(str(compressed), SMALL, str(llama))
    reader = CheckpointReader(llama)
    linear = sum(reader.meta(n).numel() for n in reader.names() if "proj" in n)
    head = reader.meta("lm_head.weight").numel()
    report = json.loads((compressed / "report.json").read_text())
    kept = sum(
        t["rank"] * sum(t["shape"]) if t["format"] == "low_rank" else t["shape"][0] * t["shape"][1]
        for t in report["targets"]
    )
    assert kept < linear
    prefill, decode = result["bounds"]["prefill"], result["bounds"]["decode"]
    assert prefill["dense"] == linear + head / 8, "the head runs once for the 8 tokens"
    assert prefill["compressed"] == kept + head / 8
    assert (decode["dense"], decode["compressed"]) == (4 * (linear + head), 4 * (kept + head))
    assert [row["bound"] for row in result["rows"]] == 2 * [prefill["speedup"], decode["speedup"]]
    assert decode["speedup"] == pytest.approx((linear + head) / (kept + head))
    assert result["bytes"] == {"dense": reader.bytes, "compressed": CheckpointReader(compressed).bytes}
    stored = sum(t["format"] == "low_rank" for t in report["targets"])
    kernels = {"prefill": DENSE_PRODUCT, "decode": KERNEL}  # 8 rows are many for a factor
    assert result["kernels"] == {key: {f"low_rank: {kernel}": stored} for key, kernel in kernels.items()}


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_every_linear_layer_is_counted_once(make_model, architecture):
    """Conv1D (GPT-2) and a head that is tied to the embedding too."""
    model = AutoModelForCausalLM.from_pretrained(make_model(architecture)).eval()
    matrices = {
        n: p
        for n, p in model.named_parameters()
        if p.dim() == 2 and "embed" not in n and "wte" not in n and "wpe" not in n
    }
    head = model.get_output_embeddings().weight
    sizes = sum(p.numel() for n, p in matrices.items() if p is not head) + head.numel()
    work, _ = counted(model, lambda: model(input_ids=torch.zeros(2, 5, dtype=torch.long)))
    assert work.multiply_adds == 10 * sizes


def test_spread_is_of_the_deciles():
    assert spread([1.0] * 5) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4.6 - 1.4) / 3)


def test_a_model_alone_has_no_dense_figures(clock, compressed):
    result = bench(str(compressed), BenchSpec((2,), (8,), 4, 2))
    assert all(row[key] is None for row in result["rows"] for key in ("dense_tokens_per_s", "speedup", "bound"))
    assert [row["compressed_tokens_per_s"] for row in result["rows"]] == [32.0, 4.0]
    assert result["bytes"]["dense"] is result["rss_bytes"]["dense"] is result["load_seconds"]["dense"] is None
    assert result["bounds"]["decode"]["dense"] is result["bounds"]["decode"]["speedup"] is None


def test_expectations(clock, llama, compressed):
    texts = ["decode_speedup >= 2", "prefill_speedup > 2", "bytes <= 1 * against", "bytes <= 200MB", "rss_bytes > 1GB"]
    result = bench(str(compressed), SMALL, str(llama), texts)
    assert [e["met"] for e in result["expectations"]] == [True, False, True, True, False]
    assert result["expectations"][2]["limit"] == CheckpointReader(llama).bytes


@pytest.mark.parametrize(
    ("text", "alone", "message"),
    [
        ("decode_speedup >= 1", True, "needs --against"),
        ("bytes <= 0.5 * against", True, "needs --against"),
        ("decode_speed >= 1", False, "did you mean 'decode_speedup'"),
        ("bytes", False, "not understood"),
    ],
)
def test_an_expectation_that_means_nothing_is_refused_before_anything_is_loaded(monkeypatch, text, alone, message):
    monkeypatch.setattr(module, "footprint", lambda *_, **__: pytest.fail("was measured"))
    with pytest.raises(InputError, match=message):
        bench("demo", SMALL, None if alone else "demo", [text])


def test_more_tokens_than_the_model_reads_are_refused(light, llama):
    with pytest.raises(InputError, match="260 positions"):
        bench(str(llama), BenchSpec((1,), (250,), 10, 2))


@pytest.mark.slow
def test_resident_memory_is_that_of_the_weights(tmp_path):
    """50 MB of weights, bfloat16 in the file: 100 MB in float32 and 50 as stored, whatever this process holds."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    numbers = sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)  # without a tokenizer: none is needed
    for dtype, size in (("auto", 4), ("bfloat16", 2)):
        found = footprint(str(tmp_path), **{**OPTIONS, "dtype": dtype})
        assert 0 < found.load_seconds < 60
        assert size * numbers == pytest.approx(found.rss_bytes, rel=0.25)


def test_what_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"config\.json|config of") as caught:
        footprint(str(tmp_path), **OPTIONS)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(footprints.sys, "executable", "/bin/false")
    with pytest.raises(ResourceError, match="process of its own failed"):
        footprint(str(tmp_path), **OPTIONS)


FLAGS = ["--batch", "1,2", "--context", "8", "--new-tokens", "2", "--repeats", "2", "--device", "cpu"]


def test_the_command_line(light, llama, compressed, tmp_path):
    command = ["bench", compressed, "--against", llama, *FLAGS, "--json", tmp_path / "b.json"]
    expected = ["--expect", "decode_speedup <= 0", "--expect", "bytes <= 200MB"]
    done = CliRunner().invoke(app, [*map(str, command), *expected])
    assert done.exit_code == 1, done.output
    assert "MISSED decode_speedup <= 0" in done.stdout
    assert "met bytes <= 200MB" in done.stdout
    assert "MB of weights in memory read a step, dense" in done.stdout
    assert f"low_rank: {KERNEL}" in done.stdout
    written = json.loads((tmp_path / "b.json").read_text())
    assert len(written["rows"]) == 4
    assert all(row["dense_tokens_per_s"] > 0 and row["speedup"] > 0 for row in written["rows"])


def test_the_command_line_in_processes_of_their_own(compressed, tmp_path):
    alone = run_cli("bench", compressed, *FLAGS, "--json", tmp_path / "b.json")
    assert alone.returncode == 0, alone.stderr
    assert "speedup" not in alone.stdout
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["rss_bytes"]["compressed"] > 0
    assert written["load_seconds"]["compressed"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "1,x"], "--batch '1,x': whole numbers"),
        (["--context", "0"], "--context '0'"),
        (["--compute-dtype", "int3"], "int3"),
        (["--json", "/nowhere/b.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(llama, flags, message):
    done = run_cli("bench", llama, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_what_is_computed_in_another_dtype_says_so(light, llama, tmp_path):
    """A table in float32 of a checkpoint in bfloat16 compares other bytes than those of the files."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(half)
    for dtype, said in (("float32", True), ("bfloat16", False)):
        done = CliRunner().invoke(app, ["bench", str(half), *FLAGS, "--compute-dtype", dtype])
        assert done.exit_code == 0, done.output
        assert f"{half}, in {dtype}" in done.stdout.replace("\n", "")
        assert f"memory in {dtype}" in done.stdout
        assert ("--compute-dtype bfloat16 compares" in " ".join(done.stdout.split())) == said
