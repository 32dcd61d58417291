#!/usr/bin/env python3
"""Bases of eora alone, with plain-SVD and with EoRA compensation, and at equal bytes the base with more bits.

One process: the calibration statistics are gathered once, every variant's tensors are encoded as they would be stored
(in the checkpoint's dtype), multiplied out and put into the dense model; bytes are the stored ones of the targets.
One-pass propagation. Prints a Markdown table and appends every point to --work/eora.jsonl as soon as it is there.

usage: eora.py --calibration TEXT --text TEXT --work DIR [--bases rtn:3:64 ...] [--ranks 16 64] [--factor-bits 8]
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.allocators import ALLOCATORS
from lrcompress.evaluation.loading import load_model
from lrcompress.evaluation.tasks import parse_tasks, task_blocks
from lrcompress.evaluation.tokens import token_perplexity
from lrcompress.formats import restored
from lrcompress.methods.eora import Eora
from lrcompress.protocols import InputStatistics, Site
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages.allocate import level_specs, rank_level
from lrcompress.stages.encode import encode_site
from lrcompress.stages.opened import Opened
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import HiddenWalk
from lrcompress.stages.request import check_request

BASES = ["rtn:4:64", "rtn:3:64", "rtn:2:64", "gptq:4:64", "gptq:3:64", "magnitude:2:4", "wanda:2:4", "sparsegpt:2:4"]
EQUAL = [("rtn:3:64", "rtn:4:64"), ("gptq:3:64", "gptq:4:64"), ("rtn:2:64", "rtn:3:64")]
"""(base to correct, base whose bytes the corrected one may take)."""


class KnownBase:
    """A base whose compressed weights are kept: both metrics and all ranks correct the same one."""

    def __init__(self, base, store: dict) -> None:
        self._base, self._store = base, store
        self.needs_gram = base.needs_gram

    def spec(self, *args):
        return self._base.spec(*args)

    def compress(self, weight: Tensor, gram: Tensor | None, site: str):
        if site not in self._store:
            self._store[site] = self._base.compress(weight, gram, site)
        return self._store[site]


def opened_for(args: argparse.Namespace, base: str, metric: str) -> Opened:
    recipe = make_recipe({
        "model": args.model, "base": base, "rank": 16,
        "method": {"name": "eora", "metric": metric, "factor_bits": args.factor_bits},
        "calibration": {"source": args.calibration, "samples": args.samples, "seqlen": args.seqlen},
    })  # fmt: skip
    return open_request(check_request(recipe), Reporter(quiet=True))


def statistics_of(opened: Opened, scratch: Path) -> dict[str, InputStatistics]:
    """Input statistics of every group, all in memory."""
    walk, found = HiddenWalk(opened, scratch), {}
    walk.start(0)
    for block in range(len(opened.blocks)):
        with opened.walker.block(block) as module:
            found.update(walk.step(block, module, opened.sites_of(block), lambda: None))
        walk.drop(block)
    return found


def put(model: nn.Module, site: Site, weight: Tensor) -> None:
    layer = model.get_submodule(site.name)
    layer.weight.data.copy_(weight.T if site.conv1d else weight)


def variants(args: argparse.Namespace, dense: dict[str, Tensor]) -> Iterator[dict]:
    """Set the model's weights and yield what they are, for every point."""
    with tempfile.TemporaryDirectory() as folder:
        first = opened_for(args, args.bases[0], "input")
        statistics = statistics_of(first, Path(folder))
    size = first.dtype.itemsize
    total = sum(s.shape[0] * s.shape[1] * size for s in first.sites)
    for base in args.bases:
        store: dict = {}
        for metric in ("plain", "input"):
            opened = opened_for(args, base, metric)
            method = opened.request.method
            assert isinstance(method, Eora)
            method._base = KnownBase(method._base, store)  # type: ignore[assignment]
            curves, artefacts = {}, {}
            for site in first.sites:
                curve = method.curve(site, size)
                artefact = method.decompose(site, dense[site.name], statistics[site.group])
                curve.errors = method.errors(artefact, curve)
                curves[site.name], artefacts[site.name] = curve, artefact
            amounts: list[tuple[str, dict[str, int]]] = []
            if metric == "plain":
                amounts.append(("base alone", dict.fromkeys(curves, 0)))
            for rank in args.ranks:
                amounts.append((f"rank {rank}", {n: rank_level(c, rank) for n, c in curves.items()}))
            for small, large in EQUAL:
                if small == base and metric == "input":
                    other = opened_for(args, large, "plain").request.method
                    budget = sum(int(other.curve(s, size).bytes[0]) for s in first.sites)
                    levels = ALLOCATORS.get("marginal_error")().allocate(list(curves.values()), budget)
                    amounts.append((f"the bytes of {large}", levels))
            for what, levels in amounts:
                for site in first.sites:
                    curve, level = curves[site.name], levels[site.name]
                    spec = level_specs(opened, [site], curve, level)[0]
                    if spec.format == "dense":
                        put(args.loaded.model, site, dense[site.name])
                        continue
                    tensors = encode_site(opened, site, spec, artefacts[site.name])
                    put(args.loaded.model, site, restored(spec, tensors, torch.float32).dense())
                stored = sum(int(curves[n].bytes[level]) for n, level in levels.items())
                yield {"base": base, "metric": metric, "what": what, "bytes": stored, "bits": 16 * stored / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bases", nargs="+", default=BASES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--factor-bits", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=16)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.loaded = load_model(args.model, device="cpu", dtype="float32")
    task = parse_tasks([f"tokens:{args.text}@{args.seqlen}"])[0]
    blocks = task_blocks(
        task, args.loaded.tokenizer, args.loaded.folder, held_out_only=False, limit=args.limit
    )  # fmt: skip
    dense = {n: m.weight.detach().clone() for n, m in args.loaded.model.named_modules() if type(m) is nn.Linear}
    print(
        f"`{' '.join(sys.argv)}`; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n"
    )
    print(
        "| base | compensation | amount | MB of the targets | bits a weight | perplexity |\n|---|---|---|---|---|---|"
    )
    begin = time.perf_counter()
    measured = token_perplexity(args.loaded.model, blocks, lambda: None)["token_perplexity"]
    print(f"| dense | | | | 16 | {measured:.2f} |", flush=True)
    names = {"plain": "plain SVD", "input": "EoRA"}
    for point in variants(args, dense):
        with torch.no_grad():
            point["perplexity"] = token_perplexity(args.loaded.model, blocks, lambda: None)["token_perplexity"]
        with (args.work / "eora.jsonl").open("a") as file:
            file.write(json.dumps(point | {"seconds": time.perf_counter() - begin}) + "\n")
        kind = "" if point["what"] == "base alone" else names[point["metric"]]
        print(
            f"| {point['base']} | {kind} | {point['what']} | {point['bytes'] / 1e6:.1f} | {point['bits']:.2f} | "
            f"{point['perplexity']:.2f} |",
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
