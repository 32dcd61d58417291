#!/usr/bin/env python3
"""Compress one model over methods x allocators x formats x ratios through the command line, and evaluate every result.

Each point is a process of its own, so seconds and peak memory are those of `lrcompress compress`. Prints a Markdown
table; every point's JSON goes to --work, and points that are there already are not run again.

usage: grid.py --calibration TEXT --text TEXT [--model demo] [--methods lord welore] [--ratios 0.1 0.2 0.3] ...
"""

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path


def cli(*args: object) -> None:
    subprocess.run([sys.executable, "-m", "lrcompress", *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def point(args: argparse.Namespace, work: Path, method: str, ratio: float, form: str, allocator: str) -> dict:
    name = f"{method}-{allocator}-{form}-{ratio:g}"
    done = work / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text())
    out, report, measured = work / name, work / "report.json", work / "eval.json"
    extra = [x for setting in args.set for x in ("--set", setting)]
    cli(
        "compress",
        args.model,
        "--method",
        method,
        "--ratio",
        ratio,
        "--format",
        form,
        "--allocator",
        allocator,
        "--calibration",
        args.calibration,
        "--samples",
        args.samples,
        "--seqlen",
        args.seqlen,
        "-o",
        out,
        "--overwrite",
        "--quiet",
        "--json",
        report,
        *extra,
    )
    cli(
        "eval",
        out,
        "--tasks",
        f"tokens:{args.text}@{args.seqlen}",
        "--limit",
        args.blocks,
        "--quiet",
        "--json",
        measured,
    )
    data, result = json.loads(report.read_text()), next(iter(json.loads(measured.read_text())["results"].values()))
    row = {
        "method": method, "allocator": allocator, "format": form, "asked": ratio, "stored": data["ratio"]["stored"],
        "perplexity": result["token_perplexity"], "seconds": data["seconds"]["total"],
        "peak_mb": data["peak_rss_bytes"] / 1e6, "checkpoint_mb": data["bytes"]["checkpoint"] / 1e6,
    }  # fmt: skip
    done.write_text(json.dumps({**row, "versions": data["versions"]}))
    if not args.keep:
        shutil.rmtree(out)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--methods", nargs="+", default=["lord", "welore"])
    parser.add_argument("--allocators", nargs="+", default=["uniform", "welore"])
    parser.add_argument("--formats", nargs="+", default=["auto", "low_rank"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path("build/grid"))
    parser.add_argument("--keep", action="store_true", help="keep the compressed checkpoints")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"command: {' '.join(sys.argv)}\nmachine: {platform.machine()}, Python {platform.python_version()}")
    print("| method | allocator | format | asked | stored | perplexity | seconds | peak MB | checkpoint MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for point_ in itertools.product(args.methods, args.ratios, args.formats, args.allocators):
        r = point(args, args.work, *point_)
        print(
            f"| {r['method']} | {r['allocator']} | {r['format']} | {r['asked']:g} | {r['stored']:.4f} | "
            f"{r['perplexity']:.2f} | {r['seconds']:.0f} | {r['peak_mb']:.0f} | {r['checkpoint_mb']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
