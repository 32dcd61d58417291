#!/usr/bin/env python3
"""Heal checkpoints in several ways for equal times or steps, and evaluate every result in and out of the training's domain.

Every run is a process of its own (`lrcompress heal`), so that its peak memory and its speed are its own; run it alone
on the machine. What is trained is compared at one seed, optimisers (`--optimizers`, on factors) over `--seeds`. Each
point's JSON goes to --work, and points that are there already are not run again. Prints Markdown tables.

usage: heal.py CHECKPOINT... --data SPEC... --texts FILE... --work DIR [--minutes 15] [--train lrc factors all]
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch


def cli(*args: object) -> None:
    subprocess.run([sys.executable, "-m", "lrcompress", *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def perplexities(args: argparse.Namespace, folder: Path) -> list[float]:
    measured = args.work / "eval.json"
    tasks = [x for text in args.texts for x in ("--tasks", f"tokens:{text}@{args.eval_seqlen}")]
    cli("eval", folder, *tasks, "--limit", args.limit, "--quiet", "--json", measured)
    return [result["token_perplexity"] for result in json.loads(measured.read_text())["results"].values()]


def before(args: argparse.Namespace, checkpoint: Path) -> list[float]:
    done = args.work / f"{checkpoint.name}-before.json"
    if not done.exists():
        done.write_text(json.dumps(perplexities(args, checkpoint)))
    return json.loads(done.read_text())


def rate(args: argparse.Namespace, key: str) -> list[str]:
    """--lr for what is trained, or for the optimiser where that is not adamw."""
    rates = dict(text.split("=") for text in args.lr)
    return ["--lr", rates[key]] if key in rates else []


def budget(args: argparse.Namespace) -> list[object]:
    return ["--minutes", args.minutes] if args.steps is None else ["--steps", args.steps]


def point(args: argparse.Namespace, checkpoint: Path, train: str, optimizer: str, seed: int) -> dict:
    name = f"{checkpoint.name}-{train}-{optimizer}-{seed}"
    done, out = args.work / f"{name}.json", args.work / name
    if not done.exists():
        data = [x for spec in args.data for x in ("--data", spec)]
        cli(
            "heal", checkpoint, *data, "-o", out, "--overwrite", *budget(args), "--train", train,
            "--optimizer", optimizer, "--seed", seed, "--seqlen", args.seqlen, "--batch-size", args.batch_size,
            "--samples", args.samples, "--distill", args.distill, *(["--dense", args.dense] if args.dense else []),
            *rate(args, train if optimizer == "adamw" else optimizer),
        )  # fmt: skip
        report = json.loads((out / "report.json").read_text())
        row = {**report["healed"], "perplexity": perplexities(args, out), "versions": report["versions"]}
        done.write_text(json.dumps(row))
        if not args.keep:
            shutil.rmtree(out)
    return json.loads(done.read_text())


def shown_budget(args: argparse.Namespace) -> str:
    return f"{args.minutes:g} minutes" if args.steps is None else f"{args.steps} steps"


def shown(values: list[float]) -> str:
    return " | ".join(f"{value:.2f}" for value in values)


def compare_trained(args: argparse.Namespace, checkpoint: Path) -> None:
    names = [Path(text.split(":")[0]).name for text in args.texts]
    print(f"\n### {checkpoint.name}: what is trained, {shown_budget(args)} each\n")
    print(f"| trained | {' | '.join(names)} | trained M | optimiser MB | tokens/s | peak MB | steps |")
    print("|---" * (6 + len(names)) + "|")
    print(f"| nothing | {shown(before(args, checkpoint))} | | | | | |", flush=True)
    for train in args.train:
        row = point(args, checkpoint, train, "adamw", args.seeds[0])
        print(
            f"| {train} | {shown(row['perplexity'])} | {row['trainable'] / 1e6:.1f} | {row['optimizer_bytes'] / 1e6:.0f} "
            f"| {row['tokens_per_second']:.0f} | {row['peak_rss_bytes'] / 1e6:.0f} | {row['steps']} |",
            flush=True,
        )


def compare_optimizers(args: argparse.Namespace, checkpoint: Path) -> None:
    names = [Path(text.split(":")[0]).name for text in args.texts]
    print(
        f"\n### {checkpoint.name}: optimisers of factors, {shown_budget(args)} each, mean and deviation over seeds {args.seeds}\n"
    )
    print(f"| optimiser | {' | '.join(names)} | held-out loss | optimiser MB | tokens/s | steps |")
    print("|---" * (5 + len(names)) + "|")
    for optimizer in args.optimizers:
        rows = [point(args, checkpoint, "factors", optimizer, seed) for seed in args.seeds]
        columns = [*zip(*(row["perplexity"] for row in rows), strict=True), [r["held_out"]["after"] for r in rows]]
        spread = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c) if len(c) > 1 else 0:.3f}" for c in columns]
        speed, steps = (statistics.mean(r[key] for r in rows) for key in ("tokens_per_second", "steps"))
        print(
            f"| {optimizer} | {' | '.join(spread)} | {rows[0]['optimizer_bytes'] / 1e6:.0f} | {speed:.0f} | {steps:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", required=True, help="evaluated: in and out of the domain of --data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--steps", type=int, help="instead of minutes: optimisers at equal steps")
    parser.add_argument("--train", nargs="*", default=["lrc", "factors", "all"])
    parser.add_argument("--optimizers", nargs="*", default=["adamw", "lora-pro"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--lr", nargs="*", default=[], help="such as factors=3e-4 lora-pro=1e-4, instead of the defaults"
    )
    parser.add_argument("--distill", default="none")
    parser.add_argument("--dense")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--keep", action="store_true", help="keep the healed checkpoints")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"`{' '.join(sys.argv)}`; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for checkpoint in args.checkpoints:
        if args.train:
            compare_trained(args, checkpoint)
        if args.optimizers:
            compare_optimizers(args, checkpoint)


if __name__ == "__main__":
    main()
