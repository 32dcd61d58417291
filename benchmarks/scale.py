"""What a block costs in seconds of the processor, by phase, for every method, and how that grows with the block's width.

    python benchmarks/scale.py --folder /tmp/scale                            # hidden 2048, MLP 8192, every method
    python benchmarks/scale.py --folder /tmp/scale --sizes 1024x4096 2048x8192 4096x14336 --runs lord svd-llm
    python benchmarks/scale.py --folder /tmp/scale --calibration --samples 4 --seqlen 2048
    python benchmarks/scale.py --folder /tmp/scale --sizes 64x128 --samples 2 --seqlen 64      # does it run?

Random Llamas in bfloat16 (benchmarks/memory.py), one block deep unless asked otherwise. Every run is a process of its own, and its
seconds are those of its threads: what else the machine does matters little. A block's seconds are all but `load`, which is
opening and probing the model, over the number of blocks. Beside the methods runs a straightforward implementation of
SVD-LLM's steps (benchmarks/speed.py). Operations are counted in another run of the smallest size: products as torch
counts them, 9 n³ an eigenproblem, n³ / 3 a Cholesky factor, 26 an SVD, 2 n³ an inverse or a triangular one times n columns.
Hours are of one thread: seconds of a block, grown by the exponent where its size was not measured, times the blocks.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layers import processor
from memory import generate
from speed import best_seconds, straightforward
from torch.utils.flop_counter import FlopCounterMode

from lrcompress.cli.show import quiet_libraries
from lrcompress.model.device import fast_float32
from lrcompress.pipeline import compress
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import HiddenWalk
from lrcompress.stages.request import check_request

BESIDE = "svd-llm"
RUNS: dict[str, dict[str, Any]] = {
    "lord": {"method": "lord", "ratio": 0.2},
    BESIDE: {},
    "welore": {"method": "welore", "ratio": 0.2},
    "eora": {"method": "eora", "base": "gptq:4:64", "rank": 32},
    "cospadi": {"method": "cospadi", "ratio": 0.2},
    "auto": {"method": "auto", "bpw": 3.0},
}
"""What is measured, by name: entries of a recipe, none for what stands beside."""

PHASES = ("load", "calibrate", "decompose", "write", "other")

MODELS = {"1B": ((2048, 8192), 16), "8B": ((4096, 14336), 32), "70B": ((8192, 28672), 80)}
"""Hidden size and MLP, and the number of blocks, of models whose hours are predicted."""


@dataclass(frozen=True)
class Cost:
    """Seconds of the processor by phase, `total` among them; peak of resident bytes; operations, 0 if not counted."""

    seconds: dict[str, float]
    peak: int
    flops: int = 0

    def block(self, blocks: int) -> float:
        """Seconds of one of the blocks, all but loading."""
        return (self.seconds["total"] - self.seconds.get("load", 0.0)) / blocks


class ProcessorTime(Reporter):
    """Counts the seconds that the threads of this process ran."""

    @contextmanager
    def timed(self, key: str) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[key] = self.seconds.get(key, 0.0) + time.process_time() - start


def operations() -> FlopCounterMode:
    """A counter that knows decompositions, too."""

    def cube(factor: float) -> Any:
        def count(shape: torch.Size, *_: Any, **__: Any) -> int:
            *batch, m, n = shape
            return int(factor * math.prod(batch) * max(m, n) * min(m, n) ** 2)

        return count

    def solve(shape: torch.Size, other: torch.Size, *_: Any, **__: Any) -> int:
        return math.prod(shape) * math.prod(other[-1:])

    aten = torch.ops.aten
    known = {
        aten._linalg_eigh: cube(9), aten.linalg_cholesky_ex: cube(1 / 3), aten._linalg_svd: cube(26),
        aten.linalg_qr: cube(4), aten.cholesky_inverse: cube(2 / 3), aten.linalg_inv_ex: cube(2),
        aten.linalg_solve_triangular: solve, aten.cholesky_solve: solve,
    }  # fmt: skip
    return FlopCounterMode(display=False, custom_mapping=known)


def run(name: str, model: Path, output: Path, samples: int, seqlen: int, *, count: bool) -> Cost:
    """Compress `model` in this process, which should have done nothing else yet."""
    quiet_libraries()
    reporter, counter = ProcessorTime(quiet=True), operations()
    start = time.process_time()
    if count:
        counter.__enter__()
    if name == BESIDE:
        straightforward(str(model), output, samples, seqlen, 0.2, reporter)
    else:
        calibration = {"source": "python-docs", "samples": samples, "seqlen": seqlen}
        recipe = make_recipe({**RUNS[name], "model": str(model), "output": str(output), "calibration": calibration})
        compress(recipe, overwrite=True, reporter=reporter)
    if count:
        counter.__exit__(None, None, None)
    total = time.process_time() - start
    seconds = {**reporter.seconds, "other": total - sum(reporter.seconds.values()), "total": total}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(seconds, peak, counter.get_total_flops() if count else 0)


def apart(name: str, model: Path, samples: int, seqlen: int, *, count: bool = False) -> Cost:
    """`run` in a process of its own; what it wrote is not kept."""
    output = model.parent / f"{model.name}-{name}"
    command = [sys.executable, __file__, "--folder", str(model.parent), "--one", name, str(model), str(output),
               "--samples", str(samples), "--seqlen", str(seqlen), *(["--count"] if count else [])]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def calibrating(name: str, model: Path, samples: int, seqlen: int) -> tuple[float, float]:
    """Seconds of the processor that samples take through the first block, from file to file: alone, and with all that
    calibration gathers there."""
    calibration = {"source": "python-docs", "samples": samples, "seqlen": seqlen}
    recipe = make_recipe({**RUNS[name], "model": str(model), "calibration": calibration})
    found = []
    with tempfile.TemporaryDirectory() as folder, fast_float32():
        opened = open_request(check_request(recipe), Reporter(quiet=True))
        walk = HiddenWalk(opened, Path(folder) / "hidden", hold_out=False)
        walk.start(0)
        for sites in ([], opened.sites_of(0)):
            with opened.walker.block(0) as module:
                start = time.process_time()
                walk.step(0, module, sites, lambda: None)
                found.append(time.process_time() - start)
    return found[0], found[1]


def product_rates(size: int = 1024) -> dict[torch.dtype, float]:
    """GFLOP/s of torch.matmul here, as the methods call it, over seconds of the processor."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(size, size, dtype=dtype)
        with fast_float32():
            found[dtype] = 2 * size**3 / best_seconds(lambda a=a: a @ a, clock=time.process_time) / 1e9  # type: ignore[misc]
    return found


Size = tuple[int, int]


def exponent(blocks: dict[Size, float]) -> float | None:
    """With which seconds grow from the least to the largest hidden size; None where there is one."""
    (few, less), (many, more) = min(blocks.items()), max(blocks.items())
    return None if few == many else math.log(more / less) / math.log(many[0] / few[0])


def hours(blocks: dict[Size, float], grown: float | None) -> list[str]:
    """Of MODELS, predicted: from the next smaller size, or the smallest."""
    found = []
    for size, count in MODELS.values():
        below = [other for other in blocks if other <= size] or [min(blocks)]
        seconds = blocks[max(below)]
        if max(below) != size:
            seconds *= (size[0] / max(below)[0]) ** (3.0 if grown is None else grown)
        found.append(f"{count * seconds / 3600:.2f}")
    return found


def size_of(text: str) -> Size:
    hidden, _, mlp = text.partition("x")
    return int(hidden), int(mlp)


def table(folder: Path, names: list[str], sizes: list[Size], blocks: int, vocabulary: int, text: list[int]) -> None:
    """Print, a run and a size a line, and what follows from them."""
    samples, seqlen = text
    models = {size: generate(folder / f"{size[0]}x{size[1]}-{blocks}", *size, blocks, vocabulary) for size in sizes}
    print(
        f"| run | hidden, MLP | {' | '.join(PHASES)} | a block | peak MB |\n|{'---|' * (len(PHASES) + 4)}", flush=True
    )
    found: dict[str, dict[Size, float]] = {name: {} for name in names}
    for size, model in models.items():
        for name in names:
            cost = apart(name, model, samples, seqlen)
            found[name][size] = cost.block(blocks)
            cells = [f"{cost.seconds.get(phase, 0.0):.1f}" for phase in PHASES]
            print(f"| {name} | {size[0]}, {size[1]} | {' | '.join(cells)} | {found[name][size]:.1f} "
                  f"| {cost.peak / 1e6:.0f} |", flush=True)  # fmt: skip
    rates = ", ".join(f"{rate:.0f} in {str(dtype)[6:]}" for dtype, rate in product_rates().items())
    print(f"\ntorch.matmul: {rates}; exponents from hidden {min(sizes)[0]} to {max(sizes)[0]}, 3 for hours without\n")
    print(f"| run | GFLOP/s at {min(sizes)[0]} | exponent | {' | '.join(f'{m}, hours' for m in MODELS)} |")
    print(f"|{'---|' * (3 + len(MODELS))}", flush=True)
    for name in names:
        cost, grown = apart(name, models[min(sizes)], samples, seqlen, count=True), exponent(found[name])
        rate = cost.flops / (found[name][min(sizes)] * blocks) / 1e9
        cells = [f"{rate:.0f}", "-" if grown is None else f"{grown:.2f}", *hours(found[name], grown)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if BESIDE in found:
        for name in names:
            parts = ", ".join(f"{found[name][s] / found[BESIDE][s]:.2f} at {s[0]}" for s in sizes)
            print(f"{name} takes {parts} of the time of {BESIDE}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[(2048, 8192)], metavar="HIDDENxMLP")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument(
        "--calibration", action="store_true", help="only what gathering adds to the first size's forward pass"
    )
    parser.add_argument("--one", nargs=3, metavar=("RUN", "MODEL", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        name, model, output = given.one
        print(json.dumps(vars(run(name, Path(model), Path(output), given.samples, given.seqlen, count=given.count))))
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}, {given.samples} x {given.seqlen}"
    )
    if given.calibration:
        size = given.sizes[0]
        model = generate(given.folder / f"{size[0]}x{size[1]}-{given.blocks}", *size, given.blocks, given.vocabulary)
        for name in given.runs:
            if name != BESIDE:
                alone, gathered = calibrating(name, model, given.samples, given.seqlen)
                print(
                    f"{name}: forward {alone:.1f} s, with statistics {gathered:.1f} s: {gathered / alone:.2f} times",
                    flush=True,
                )
        return
    table(given.folder, given.runs, given.sizes, given.blocks, given.vocabulary, [given.samples, given.seqlen])


if __name__ == "__main__":
    main()
