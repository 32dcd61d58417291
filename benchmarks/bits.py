#!/usr/bin/env python3
"""Perplexity against bytes: `auto`, its 16-bit formats and other people's quantisers, each its own package, in one run.

The same calibration blocks and evaluation blocks for all. Ours are written and loaded by the command; a peer runs in a
virtual environment of its own (made in --work from the pins of PEERS, once), reads the dense model and the blocks, and
leaves the dense values of its weights with the bytes that they take, which are put into the dense model. Embeddings and
head stay in 16 bits everywhere. Results stay in --work: points that are there are not run again. Prints a Markdown
table a text and writes the pictures.

usage: bits.py --calibration SPEC [SPEC ...] --texts FILE [FILE ...] --work DIR [--peers hqq ggml ...]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from asked import calibration_ids, evaluation_blocks, options, say_what_ran, table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lrcompress.evaluation.loading import load_model
from lrcompress.evaluation.tokens import token_perplexity
from lrcompress.report.pareto import draw

FOLDER = Path(__file__).with_name("bit_peers")
TORCH = "torch==2.13.0"
PEERS: dict[str, tuple[list[str], list[str]]] = {
    "hqq": ([TORCH, "hqq==0.2.8.post1", "transformers==5.24.0"], ["4:64", "3:64"]),
    "gptqmodel": (["gptqmodel==7.7.0"], ["4:64", "3:64"]),
    "autoround": ([TORCH, "auto-round==0.16.1"], ["4:64", "3:64"]),
    "ggml": (
        [TORCH, "xllamacpp==2026.10.11549", "gguf==0.19.0", "transformers==5.24.0"],
        ["Q8_0", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K"],
    ),
}
"""What is installed, in this order, and what is asked of it: bits:group, or a type of ggml."""
TITLES = {
    "hqq": "HQQ",
    "gptqmodel": "GPTQModel",
    "autoround": "AutoRound",
    "ggml": "llama.cpp types, imatrix",
    "auto": "auto",
    "auto16": "auto, 16-bit formats",
}


class Judge:
    """Measures weights put into the dense model, and checkpoints of ours, on the same blocks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.loaded = load_model(args.model, device="cpu", dtype="float32")
        self.model = self.loaded.model
        named = self.model.named_modules()
        self.layers = {n: m for n, m in named if type(m) is nn.Linear and ".layers." in f".{n}"}
        self.dense = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.targets = sum(weight.numel() for weight in self.dense.values())
        self.total = sum(parameter.numel() for parameter in self.model.parameters())
        self.blocks = evaluation_blocks(args, self.loaded)

    def of_model(self, model: nn.Module) -> dict[str, Any]:
        """Task to results."""
        return {key: token_perplexity(model, part, lambda: None) for key, part in self.blocks.items()}

    def of_weights(self, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
        """Task to results, and what the file says of itself."""
        with safe_open(path, "pt") as file, torch.no_grad():
            told = file.metadata()
            names = {name.removesuffix(".weight") for name in file.keys()}
            if names != set(self.layers):
                raise SystemExit(f"{path} has {len(names)} weights, the model {len(self.layers)}")
            for name, layer in self.layers.items():
                layer.weight.copy_(file.get_tensor(f"{name}.weight"))
        found = self.of_model(self.model)
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.copy_(self.dense[name])
        return found, told


def run(command: list[str], log: Path) -> float:
    """Seconds that a command took; SystemExit with the end of its output where it failed."""
    start = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}\n{log.read_text()[-2000:]}")
    return time.perf_counter() - start


def python_of(peer: str, work: Path) -> str:
    """The interpreter of a peer's environment, which is made where it is missing."""
    home = work / "environments" / peer
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        run([sys.executable, "-m", "venv", "--clear", str(home)], work / f"{peer}-venv.log")
        for package in PEERS[peer][0]:  # torch alone first: the others would take a CUDA build
            run([str(python), "-m", "pip", "install", package], work / f"{peer}-install.log")
        (home / "complete").touch()
    return str(python)


def point(path: Path, make: Any) -> dict[str, Any]:
    """The row of a file, made where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        row = make()
        path.write_text(json.dumps(row))
        print(row["method"], row["setting"], f"{row['bpw']:.3f} bpw", row["results"], file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def theirs(args: argparse.Namespace, judge: Judge, peer: str, setting: str) -> dict[str, Any]:
    """A peer's point: runs FOLDER/with_PEER.py MODEL IDS OUTPUT SETTING."""
    output = args.work / f"{peer}.safetensors"
    python = python_of(peer, args.work)
    command = [python, str(FOLDER / f"with_{peer}.py"), str(judge.loaded.folder), str(args.work / "ids.safetensors")]
    log = args.work / f"{peer}-{setting.replace(':', '-')}.log"
    seconds = run([*command, str(output), setting], log)
    results, told = judge.of_weights(output)
    output.unlink()
    return row_of(judge, TITLES[peer], setting, int(told["bytes"]), seconds, results) | {"version": told["version"]}


def ours(args: argparse.Namespace, judge: Judge, kind: str, setting: str) -> dict[str, Any]:
    """A point of the command: setting is an option with its value."""
    output = args.work / "ours" / f"{kind}{setting.replace(' ', '')}"
    texts = [part for source in args.calibration for part in ("--calibration", source)]
    command = [sys.executable, "-m", "lrcompress", "compress", args.model, "--method", "auto", *setting.split()]
    command += ["--format", "auto"] if kind == "auto16" else []
    command += [
        *texts,
        "--samples",
        str(args.samples),
        "--seqlen",
        str(args.seqlen),
        "--cache",
        str(args.work / "cache"),
    ]
    run([*command, "-o", str(output), "--resume"], output.with_name(f"{output.name}.log"))
    report = json.loads((output / "report.json").read_text())
    model = load_model(str(output), device="cpu", dtype="float32").model
    stored, seconds = report["bytes"]["targets_stored"], report["seconds"]["total"]
    return row_of(judge, TITLES[kind], setting, stored, seconds, judge.of_model(model))


def row_of(judge: Judge, method: str, setting: str, stored: int, seconds: float, results: Any) -> dict[str, Any]:
    """What is kept of a point; `bytes` of the whole checkpoint, all else in 16 bits."""
    return {
        "method": method, "setting": setting, "ratio": setting, "bpw": 8 * stored / judge.targets,
        "bytes": 2 * (judge.total - judge.targets) + stored, "seconds": seconds, "results": results,
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__, list(PEERS), 48, "of all sources together")
    parser.add_argument("--bpw", nargs="*", default=["1.6", "2.3", "2.5", "3.1", "3.5", "4.25"])
    parser.add_argument("--ratios", nargs="*", default=["0.5", "0.3", "0.1"], help="of the 16-bit formats")
    args = parser.parse_args()
    args.work = args.work.resolve()
    (args.work / "ours").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    judge = Judge(args)
    ids = calibration_ids(args, judge.loaded, args.samples // len(args.calibration))
    save_file({"ids": ids.to(torch.int32)}, args.work / "ids.safetensors")
    points = args.work / "points"
    rows = [
        point(points / f"{kind}-{value}.json", lambda k=kind, o=option, v=value: ours(args, judge, k, f"{o} {v}"))
        for kind, option, values in (("auto", "--bpw", args.bpw), ("auto16", "--ratio", args.ratios))
        for value in values
    ]
    rows += [
        point(points / f"{peer}-{asked.replace(':', '-')}.json", lambda p=peer, a=asked: theirs(args, judge, p, a))
        for peer in args.peers
        for asked in PEERS[peer][1]
    ]
    dense = json.loads(json.dumps(point(points / "dense.json", lambda: dense_row(judge))))
    show(args, rows, dense)


def dense_row(judge: Judge) -> dict[str, Any]:
    return row_of(judge, "dense", "", 2 * judge.targets, 0.0, judge.of_model(judge.model))


def show(args: argparse.Namespace, rows: list[dict[str, Any]], dense: dict[str, Any]) -> None:
    """The table on standard output, the pictures into the work folder."""
    say_what_ran()
    tasks = list(dense["results"])

    def cells(row: dict[str, Any]) -> list[str]:
        values = [(r["results"][task]["token_perplexity"] for r in (row, dense)) for task in tasks]
        shown = [f"{value:.2f} (x {value / base:.3f})" for value, base in values]
        name = row["method"] + (f" {row['version']}" if "version" in row else "")
        return [name, row["setting"], f"{row['bpw']:.2f}", *shown, f"{row['seconds']:.0f}"]

    ordered = sorted([dense, *rows], key=lambda row: row["bpw"])
    table(["what", "setting", "bpw", *tasks, "seconds"], map(cells, ordered))
    result = {"model": args.model, "dense": dense, "points": rows}
    for path in draw(result, args.work):
        print(f"\nwrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
