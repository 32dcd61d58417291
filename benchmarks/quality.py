#!/usr/bin/env python3
"""Perplexity against bytes: every 16-bit method of the registry and the published peers (peers.py), in one run.

The same calibration blocks, the same evaluation blocks, the same ratios; ours are written, loaded and measured by
`lrcompress.sweep`, the peers' weights are put into the dense model. A peer's ratio counts the numbers it would store.
Results stay in --work: points that are there are not run again. Prints Markdown tables and writes quality-*.svg.

usage: quality.py --calibration SPEC [SPEC ...] --texts FILE [FILE ...] --work DIR [--ratios 0.1 ...] [--ours auto ...] [--peers svd_llm ...]
"""

import argparse
import json
import sys
import time

import peers
import torch
import yaml
from asked import calibration_ids, evaluation_blocks, options, say_what_ran, table, tasks_of
from torch import nn

from lrcompress.evaluation.loading import load_model
from lrcompress.evaluation.tokens import token_perplexity
from lrcompress.recipe import Sweep, validated
from lrcompress.report.pareto import draw
from lrcompress.report.progress import Reporter
from lrcompress.sweep import sweep

OURS = ["auto", "cospadi", "lord", "welore"]
PEERS = ["svd_llm", "asvd", "zs_svd", "welore", "rocket"]
TITLES = {"svd_llm": "SVD-LLM*", "asvd": "ASVD*", "zs_svd": "ZS-SVD*", "welore": "WeLore*", "rocket": "ROCKET*"}
STEPS = [0.9, 0.7, 0.5, 0.3]
"""Kept ratios that ASVD's sensitivity search and ROCKET's knapsack try here; the papers try more."""


def ours(args: argparse.Namespace) -> dict:
    data = {
        "model": args.model,
        "methods": [yaml.safe_load(text) for text in args.ours],
        "ratios": args.ratios,
        "calibration": [{"source": s, "samples": args.samples, "seqlen": args.seqlen} for s in args.calibration],
        "evaluate": {"tasks": tasks_of(args), "limit": args.limit},
        "output": str(args.work / "ours"),
        "keep": args.keep,
    }
    return sweep(validated(Sweep, data, "quality.py"), reporter=Reporter())


def theirs(args: argparse.Namespace) -> list[dict]:
    """The peers' points, each in a file of its own."""
    loaded = load_model(args.model, device="cpu", dtype="float32")
    model = loaded.model
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and ".layers." in f".{n}"}
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    targets = sum(weight.numel() for weight in weights.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks = evaluation_blocks(args, loaded)
    ids = calibration_ids(args, loaded, args.samples)
    text: peers.Text | None = None

    def put(found: peers.Weights) -> None:
        for name, weight in weights.items():
            layers[name].weight.data.copy_(found.get(name, weight))

    def loss(found: peers.Weights) -> float:
        put(found)
        with torch.no_grad():
            row = ids[:1, :512]
            return float(nn.functional.cross_entropy(model(row).logits[0, :-1].float(), row[0, 1:]))

    rows = []
    for name in args.peers:
        paths = {ratio: args.work / "peers" / f"{name}-{ratio:g}.json" for ratio in args.ratios}
        missing = [ratio for ratio, path in paths.items() if not path.exists()]
        if missing and text is None:
            put({})
            text = peers.gather(model, layers, ids, gradients="zs_svd" in args.peers)
        extra = {"asvd": (loss, STEPS), "rocket": (STEPS, [1.5, 2.0, 3.0])}.get(name, ())
        begin = time.perf_counter()
        compressed = getattr(peers, name)(weights, text, [1 - ratio for ratio in missing], *extra)
        for ratio, (found, numbers) in zip(missing, compressed, strict=True):
            seconds = time.perf_counter() - begin
            put(found)
            results = {key: token_perplexity(model, part, lambda: None) for key, part in blocks.items()}
            row = {
                "method": TITLES[name], "ratio": ratio, "seed": 0, "stored_ratio": 1 - numbers / targets,
                "bytes": 2 * (total - targets + numbers), "seconds": seconds, "results": results,
            }  # fmt: skip
            paths[ratio].parent.mkdir(parents=True, exist_ok=True)
            paths[ratio].write_text(json.dumps(row))
            print(name, ratio, results, file=sys.stderr, flush=True)
            begin = time.perf_counter()
        rows += [json.loads(path.read_text()) for path in paths.values()]
    return rows


def main() -> None:
    parser = options(__doc__, PEERS, 32, "of every source")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--ours", nargs="*", default=OURS, help="YAML, such as '{name: auto, propagation: one_pass}'")
    parser.add_argument("--keep", action="store_true", help="our checkpoints too, in WORK/ours")
    args = parser.parse_args()
    result = ours(args)
    result["points"] += theirs(args)
    say_what_ran()
    for task, values in result["dense"]["results"].items():
        print(f"\n{task}, dense {values['token_perplexity']:.2f}\n")
        found: dict[str, dict[float, float]] = {}
        for row in result["points"]:
            found.setdefault(row["method"], {})[row["ratio"]] = row["results"][task]["token_perplexity"]
        rows = ([m, *(f"{at[r]:.2f}" if r in at else "-" for r in args.ratios)] for m, at in found.items())
        table(["method", *(f"{ratio:.0%}" for ratio in args.ratios)], rows)
    for path in draw(result, args.work):
        print(f"\nwrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
