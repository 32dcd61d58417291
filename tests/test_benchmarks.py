"""The benchmarks' own implementations, on tiny models."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.evaluation import bench as measuring
from lrcompress.evaluation.footprint import Footprint
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages.opening import open_request
from lrcompress.stages.request import check_request
from tests.commands import run_cli

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name):
    path = BENCHMARKS / f"{name}.py"
    if str(BENCHMARKS) not in sys.path:  # they import each other
        sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_straightforward_implementation_is_optimal_in_the_whitened_norm(llama, tmp_path):
    """Every truncated product's output error on the calibration rows is the tail of the whitened singular values."""
    speed = benchmark("speed")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    layers = speed.targets(model)
    assert len(layers) == 21
    ids = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    grams = speed.gather(model, layers, ids)
    factors = speed.factorise(layers, grams, 0.6)
    for name, layer in layers.items():
        left, right = factors[f"{name}.u"], factors[f"{name}.v"]
        error = (layer.weight.detach() - left @ right).double()
        root = torch.linalg.cholesky(grams[name].double() + 1e-9 * torch.eye(len(grams[name])))
        tail = torch.linalg.svdvals(layer.weight.detach().double() @ root)[left.shape[1] :].square().sum()
        assert float(torch.trace(error @ grams[name].double() @ error.T)) == pytest.approx(float(tail), rel=1e-2)
    speed.straightforward(str(llama), tmp_path / "plain", 2, 64, 0.4)
    stored = load_file(tmp_path / "plain/model.safetensors")
    assert len([name for name in stored if name.endswith(".u")]) == 21
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


def test_rates_are_measured_for_every_operation():
    found = benchmark("speed").rates(48, 64)
    assert {"torch.matmul float64", "eigh float64", "cholesky float64", "svd float32"} <= found.keys()
    assert all(rate > 0 for rate in found.values())


def test_the_generated_checkpoint_is_an_ordinary_one(tmp_path):
    memory = benchmark("memory")
    folder = memory.generate(tmp_path / "random", 64, 128, 2, 300, shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    reader = CheckpointReader(folder)
    assert {reader.meta(name).dtype for name in reader.names()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("some words", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_every_format_is_timed_beside_dense(capsys, monkeypatch):
    layers = benchmark("layers")
    monkeypatch.setattr(sys, "argv", ["layers.py", "--hidden", "64", "--mlp", "128", "--rows", "1", "--seconds", "0"])
    layers.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    names = list(layers.FORMATS)
    assert [(row[0].removeprefix("| "), row[1]) for row in rows] == [
        (name, dtype) for dtype in layers.DTYPES for name in names
    ]
    assert all(float(row[2].split(" ")[0]) > 0 for row in rows)
    assert all(row[3].removesuffix(" |") for row in rows)


@pytest.mark.parametrize("name", ["semi_sparse", "sparse_dictionary", "sum 3:64 + 32 in 8 bits", "coded 3.1 bits"])
def test_memory_of_a_used_checkpoint(name, llama, tmp_path):
    """What is held is what a loaded model has; and it generates."""
    memory, whole = benchmark("memory"), benchmark("whole")
    folder = whole.compressed(llama, tmp_path / "stored", name, 0.5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = memory.measure(folder, "float32")
    assert found.held == sum(t.nbytes for t in model.state_dict().values())
    assert found.grown <= found.peak
    assert set(json.loads((folder / "config.json").read_text())["quantization_config"]["modules"])


def test_the_device_script_runs_on_the_processor(llama, tmp_path, capsys, monkeypatch):
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu, "command", lambda *arguments: run_cli(*arguments).stdout)  # from a server: fast
    monkeypatch.setattr(gpu, "peak", gpu.measure_peak)
    monkeypatch.setattr(measuring, "footprint", lambda label, **_: Footprint(1.0, 1))
    flags = ["--folder", tmp_path, "--model", llama, "--text", "tokens:python-docs@32", "--limit", 2, "--formats",
             "quantized", "--samples", 2, "--seqlen", 32, "--context", 16, "--new-tokens", 2, "--device", "cpu",
             "--no-tests"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, flags)])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith(("| dense", "| quantized"))]
    assert [len(row) for row in rows] == [6, 6]
    assert all(float(cell) > 0 for row in rows for cell in row[1:4])
    assert all(row[4].removesuffix(" |").strip().isdigit() for row in rows)


def test_quality_and_bits_print_what_they_measured(llama, tmp_path, capsys, monkeypatch):
    quality, bits = benchmark("quality"), benchmark("bits")
    text = tmp_path / "text.txt"
    text.write_text("One sentence follows another. " * 200)
    flags = ["--model", llama, "--calibration", text, "--texts", text, "--work", tmp_path / "work", "--ratios", 0.5,
             "--ours", "{name: lord, metric: plain}", "--peers", "svd_llm", "--samples", 2, "--seqlen", 32,
             "--limit", 2]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, flags)])
    quality.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("`quality.py --model")
    assert "torch" in lines[0]
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows] == ["method", "lord-metric=plain", "SVD-LLM*"]
    assert rows[0][1] == "50%"
    assert all(float(row[1]) > 0 for row in rows[1:])
    points = json.loads((tmp_path / "work/ours/results.json").read_text())
    (task,) = points["dense"]["results"]
    measured = points["points"][0]["results"][task]["token_perplexity"]
    assert rows[1][1] == f"{measured:.2f}"

    dense = {"method": "dense", "setting": "", "bpw": 16, "bytes": 100, "seconds": 0, "ratio": "",
             "results": {task: {"token_perplexity": 8.0}}}  # fmt: skip
    ours = {**dense, "method": "auto", "setting": "--bpw 4", "bpw": 4, "bytes": 30,
            "results": {task: {"token_perplexity": 10.0}}}  # fmt: skip
    monkeypatch.setattr(bits, "draw", lambda *_: [])
    bits.show(type("Arguments", (), {"model": "m", "work": tmp_path})(), [ours], dense)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        ["auto", "--bpw 4", "4.00", "10.00 (x 1.250)", "0"],
        ["dense", "", "16.00", "8.00 (x 1.000)", "0"],
    ]


@pytest.mark.parametrize("name", ["lord", "svd-llm"])
def test_seconds_of_the_processor_by_phase(name, llama, tmp_path):
    scale = benchmark("scale")
    cost = scale.run(name, llama, tmp_path / "out", 2, 64, count=False)
    parts = [seconds for phase, seconds in cost.seconds.items() if phase != "total"]
    assert sum(parts) == pytest.approx(cost.seconds["total"])
    assert {"load", "calibrate", "decompose", "write"} <= cost.seconds.keys()
    assert min(parts) >= 0
    assert cost.block(3) == pytest.approx((cost.seconds["total"] - cost.seconds["load"]) / 3)


def test_growth_and_hours_are_a_power_of_the_width():
    scale = benchmark("scale")
    blocks = {(1024, 4096): 2.0, (2048, 8192): 2.0 * 2**2.5, (4096, 14336): 2.0 * 4**2.5}
    assert scale.exponent(blocks) == pytest.approx(2.5)
    assert scale.exponent({(64, 128): 1.0}) is None
    assert [float(hour) for hour in scale.hours(blocks, 2.5)] == [
        pytest.approx(count * 2.0 * (hidden / 1024) ** 2.5 / 3600, abs=0.005)
        for (hidden, _), count in scale.MODELS.values()
    ]


def test_operations_of_decompositions_are_counted():
    scale = benchmark("scale")
    matrix = torch.randn(8, 20, dtype=torch.float64)
    square = matrix @ matrix.T
    cases = [
        (lambda: matrix @ matrix.T, 2 * 8 * 20 * 8),
        (lambda: torch.linalg.eigh(square), 9 * 8**3),
        (lambda: torch.linalg.cholesky_ex(square), 8**3 // 3),
        (lambda: torch.linalg.svd(matrix, full_matrices=False), 26 * 20 * 8**2),
    ]
    for work, flops in cases:
        with scale.operations() as counter:
            work()
        assert counter.get_total_flops() == flops


def test_what_gathering_adds_to_the_forward_pass(llama):
    alone, gathered = benchmark("scale").calibrating("lord", llama, 4, 64)
    assert 0 < alone
    assert 0 < gathered


def test_a_plan_of_many_experts_has_a_curve_a_shape(tmp_path):
    huge = benchmark("huge")
    numbers = huge.write(tmp_path / "huge", huge.SMALL)
    recipe = make_recipe({
        "model": str(tmp_path / "huge"), "method": "lord", "allocator": "uniform", "ratio": 0.2,
        "calibration": {"source": "python-docs", "samples": 2, "seqlen": 32},
    })  # fmt: skip
    opened = open_request(check_request(recipe), Reporter(quiet=True), calibrate=False)
    assert numbers == sum(opened.reader.meta(name).numel() for name in opened.reader.names())
    curves = opened.costs()
    assert len(curves) == len(opened.sites) > 3 * 3 * huge.SMALL["n_routed_experts"]
    shapes = {site.shape for site in opened.sites}
    assert len({id(curve.stored.bytes) for curve in curves}) == len(shapes) < 12
    assert len({curve.levels.untyped_storage().data_ptr() for curve in curves}) <= len(shapes)
