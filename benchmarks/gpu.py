"""Every format on one device, in one go: tests, perplexity, speed and peak memory, in at most eight minutes on a GPU.

    python benchmarks/gpu.py --folder /tmp/gpu                          # on the accelerator, or on the CPU without one
    python benchmarks/gpu.py --folder /tmp/gpu --model demo --text wiki.test.raw --formats quantized sum coded

The model is compressed once a format, and all are measured by the same code on any device: the part of the suite that
is marked `device`, perplexity by lm-eval of dense and of each format, prefill and decoding times dense in turns
(`lrcompress bench`), and the peak of the device's memory (of a process's where there is no accelerator).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from layers import processor

from lrcompress.evaluation.bench import BenchSpec, bench
from lrcompress.foreign.opening import open_model
from lrcompress.model.device import resolve_device

ROOT = Path(__file__).parent.parent
METHODS: dict[str, list[str]] = {
    "quantized": ["--method", "eora", "--base", "rtn:4:64", "--rank", "0"],
    "sum": ["--method", "eora", "--base", "gptq:3:64", "--rank", "32"],
    "semi_sparse": ["--method", "eora", "--base", "wanda:2:4", "--rank", "0"],
    "low_rank": ["--method", "lord", "--format", "low_rank", "--ratio", "0.3"],
    "pivoted": ["--method", "lord", "--format", "pivoted", "--ratio", "0.3"],
    "sparse_dictionary": ["--method", "cospadi", "--set", "rounds=1", "--ratio", "0.3"],
    "coded": ["--method", "auto", "--bpw", "4"],
}
"""How a checkpoint of each format is made."""


def command(*arguments: object) -> str:
    """What `lrcompress` prints."""
    line = [sys.executable, "-m", "lrcompress", *map(str, arguments)]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout


def compressed(model: str, folder: Path, name: str, calibration: list[str], device: str) -> Path:
    """The checkpoint of a format, made once."""
    if not (folder / "config.json").exists():
        command(
            "compress", model, *METHODS[name], "-o", folder, "--overwrite", "--quiet", "--device", device, *calibration
        )
    return folder


def perplexity(model: str, text: str, limit: int, device: str, found: Path) -> float:
    """Words' perplexity of a text by lm-eval."""
    command("eval", model, "--tasks", text, "--limit", limit, "--device", device, "--quiet", "--json", found)
    (result,) = json.loads(found.read_text())["results"].values()
    return float(result.get("word_perplexity", result.get("token_perplexity")))


def speeds(model: str, dense: str, context: int, new_tokens: int, device: str) -> dict[str, Any]:
    """Prefill and decoding, times dense, and the kernels that were taken."""
    return bench(model, BenchSpec((1,), (context,), new_tokens, repeats=3), dense, device=device)


def peak(model: str, device: str) -> int:
    """Most bytes while a model is loaded and generates four tokens, in a process of its own."""
    line = [sys.executable, __file__, "--peak", model, "--device", device]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return int(done.stdout.split()[-1])


def measure_peak(model: str, device: str) -> int:
    """`peak` in this process."""
    from lrcompress.evaluation.loading import load_network

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, network = load_network(model, device=device)
    ids = torch.ones(1, 8, dtype=torch.long, device=resolve_device(device))
    with torch.inference_mode():
        network.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
    if resolve_device(device).type != "cpu":
        return int(torch.accelerator.max_memory_allocated())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def tested() -> str:
    """The last line of the marked tests."""
    line = [sys.executable, "-m", "pytest", "-q", "-m", "device", "tests/kernels", "tests/contract"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    return f"exit {done.returncode}: {done.stdout.strip().splitlines()[-1]}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("gpu"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="text:python-docs", help="a task of lrcompress eval")
    parser.add_argument("--limit", type=int, default=8, help="of the task's documents or blocks")
    parser.add_argument("--formats", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--peak", metavar="MODEL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak is not None:
        print(measure_peak(given.peak, given.device))
        return
    start, device = time.perf_counter(), resolve_device(given.device)
    accelerator = "" if device.type == "cpu" else f", {torch.get_device_module(device).get_device_name(device)}"
    print(f"torch {torch.__version__}, {device}, {processor()}{accelerator}, {given.model}")
    if not given.no_tests:
        print(f"tests: {tested()}", flush=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    calibration = ["--calibration", "python-docs", "--samples", str(given.samples), "--seqlen", str(given.seqlen)]
    dense, notes = str(open_model(given.model).folder), given.folder / "measured.json"
    print(
        "| format | perplexity | prefill x dense | decode x dense | peak MB | kernels in decode |\n|---|---|---|---|---|---|"
    )
    found = perplexity(dense, given.text, given.limit, given.device, notes)
    print(f"| dense | {found:.2f} | 1 | 1 | {peak(dense, given.device) / 1e6:.0f} | |", flush=True)
    for name in given.formats:
        folder = str(compressed(dense, given.folder / name, name, calibration, given.device))
        found = perplexity(folder, given.text, given.limit, given.device, notes)
        ran = speeds(folder, dense, given.context, given.new_tokens, given.device)
        times = {row["phase"]: row["speedup"] for row in ran["rows"]}
        kernels = ", ".join(ran["kernels"]["decode"])
        print(
            f"| {name} | {found:.2f} | {times['prefill']:.2f} | {times['decode']:.2f} "
            f"| {peak(folder, given.device) / 1e6:.0f} | {kernels} |", flush=True,
        )  # fmt: skip
    print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
