#!/usr/bin/env python3
"""Is a low-rank part worth its bytes beside coded integers? Of every target of some blocks, at the bits asked for.

Two ways, both optimal in the two-sided metric and with factors of 8 bits: the part is taken from the error after rounding
(SVD of Nᵀ (Ŵ - W) M), or from the weight before it (SVD of Nᵀ W M; what is left is rounded). Against them stand the
same bytes in a finer step. Prints, a kind of weight and a rank, the error that is left over that of the finer step,
in the geometric mean over the blocks: below 1 the low-rank part pays.

usage: low_rank_beside.py MODEL --calibration TEXT [--blocks 3 15 27] [--bits 0.8 1.2 2.3] [--ranks 1 4 16]
"""

import argparse
import math
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrcompress.linalg.rates import rates_of
from lrcompress.linalg.two_sided import expected_sizes, offsets, round_two_sided
from lrcompress.methods.ecsq import Ecsq
from lrcompress.pipeline import compress
from lrcompress.protocols import InputStatistics, Site
from lrcompress.recipe import make_recipe

FACTOR_BITS = 8


def at(bits: float, rates: Tensor, row: int) -> float:
    """log2 of the step (row 1) or of the error (row 2) where an entry takes `bits`."""
    values = rates[row] if row == 1 else rates[row].log2()
    return float(np.interp(bits, rates[0].flip(0).numpy(), values.flip(0).numpy()))


def ratios(artefact: dict[str, Tensor], bits: float, ranks: list[int]) -> dict[int, tuple[float, float]]:
    """Rank to error over that of a finer step: with the part from the error, and from the weight."""
    target, left, right, rates = (artefact[name] for name in ("target", "left", "right", "rates"))
    m, n = target.shape
    scaled = target / 2 ** at(bits, rates, 1)
    codes = round_two_sided(scaled, left, right, offsets(expected_sizes(scaled)))
    lost = torch.linalg.svdvals(left.T @ (codes - scaled) @ right).square()
    u, s, v = torch.linalg.svd(left.T @ target @ right, full_matrices=False)
    found = {}
    for rank in (rank for rank in ranks if rank < min(m, n)):
        beside = FACTOR_BITS * rank * (m + n) / (m * n)
        finer = 2 ** (at(bits + beside, rates, 2) - at(bits, rates, 2))
        after = float(lost[rank:].sum() / lost.sum()) / finer
        part = (u[:, :rank] * s[:rank]) @ v[:rank]
        part = torch.linalg.solve_triangular(left.T, part, upper=False, unitriangular=True)
        part = torch.linalg.solve_triangular(right, part, upper=True, unitriangular=True, left=False)
        rest = rates_of(target - part, left, right)
        found[rank] = after, 2 ** (at(bits, rest, 2) - at(bits + beside, rates, 2))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--blocks", nargs="+", type=int, default=[3, 15, 27])
    parser.add_argument("--bits", nargs="+", type=float, default=[0.8, 1.2, 2.3])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 16])
    args = parser.parse_args()
    found: dict[tuple[str, tuple[int, int], float, int], list[tuple[float, float]]] = {}
    decompose = Ecsq.decompose

    def watched(self: Ecsq, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        artefact = decompose(self, site, weight, statistics)
        kind = re.sub(r".*\.\d+\.", "", site.name)
        for bits in args.bits:
            for rank, pair in ratios(artefact, bits, args.ranks).items():
                found.setdefault((kind, site.shape, bits, rank), []).append(pair)
        return artefact

    Ecsq.decompose = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        compress(
            make_recipe(
                {
                    "model": args.model, "method": "ecsq", "bpw": 3, "output": str(Path(folder) / "coded"),
                    "calibration": [
                        {"source": text, "samples": args.samples // len(args.calibration), "seqlen": args.seqlen}
                        for text in args.calibration
                    ],
                    "target": [f"*.{block}.*" for block in args.blocks],
                }
            )
        )  # fmt: skip
    print(f"`{' '.join(sys.argv)}`; torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| weight | bits | rank | bits of the part | from the error | from the weight |\n|---|---|---|---|---|---|")
    for (kind, (m, n), bits, rank), pairs in found.items():
        after, before = (math.exp(sum(map(math.log, part)) / len(part)) for part in zip(*pairs, strict=True))
        cost = FACTOR_BITS * rank * (m + n) / (m * n)
        print(f"| {kind} {m} x {n} | {bits} | {rank} | {cost:.3f} | {after:.3f} | {before:.3f} |")


if __name__ == "__main__":
    main()
