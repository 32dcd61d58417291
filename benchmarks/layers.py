"""How fast does every stored format multiply, times the dense layer of the same dtype?

    python benchmarks/layers.py                                     # a block of a 1B Llama: hidden 2048, MLP 8192
    python benchmarks/layers.py --hidden 256 --mlp 512 --formats "quantized 4:64" --seconds 0.1

Random weights (benchmarks/stored.py); of a block's seven layers q and o, gate and up have one shape each, k and v a
quarter of q's rows. All formats and dense are timed by turns, one call after the other. A ratio is that of the sums over
the layers of the fastest tenth of the calls: what other programs take of the machine is in the slower ones. On a busy
machine: OMP_NUM_THREADS=1 and --thread-time, the seconds that the thread itself ran. The bound is
that of the bytes that decoding reads, and of the multiply-adds of prefill.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from stored import FORMATS, layer
from torch import Tensor, nn

from lrcompress.evaluation.bounds import counted

DTYPES = ["bfloat16", "float32"]


def shapes(hidden: int, mlp: int) -> dict[tuple[int, int], int]:
    """(out, in) of a block's linear layers, and how many there are."""
    return {(hidden, hidden): 2, (hidden // 4, hidden): 2, (mlp, hidden): 2, (hidden, mlp): 1}


CLOCKS = {False: time.perf_counter, True: time.thread_time}
"""By whether a thread's own time is wanted."""


def timed(
    runs: dict[str, Callable[[], Tensor]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every call, the runs by turns; the first two of each do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    end = clock() + seconds
    while clock() < end or len(times["dense"]) < 5:
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


def fastest(times: list[float]) -> float:
    """Median of the fastest tenth."""
    return statistics.median(sorted(times)[: max(1, len(times) // 10)])


def measured(
    shape: tuple[int, int], names: list[str], dtype: torch.dtype, rows: int, seconds: float, clock: Callable[[], float]
) -> dict[str, tuple[float, int, int, str]]:
    """Per format and "dense": seconds of a call, weight bytes read, multiply-adds, and what multiplied."""
    with torch.inference_mode(False):  # as loaded weights are: no inference tensors
        modules: dict[str, nn.Module] = {
            "dense": nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False)
        }
        modules |= {name: layer(name, shape, dtype) for name in names}
    x = torch.randn(1, rows, shape[1], dtype=dtype)
    times = timed({name: partial(module, x) for name, module in modules.items()}, seconds, clock)
    found = {}
    for name, module in modules.items():
        work, _ = counted(module, partial(module, x))
        kernel = "".join(work.kernels).partition(": ")[2] or "dense product"
        found[name] = (fastest(times[name]), work.weight_bytes, work.multiply_adds, kernel)
    return found


@torch.inference_mode()
def table(
    hidden: int,
    mlp: int,
    names: list[str],
    dtype: torch.dtype,
    contexts: list[int],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[str]:
    """Lines of Markdown, a row a format."""
    cells: dict[str, list[str]] = {name: [] for name in names}
    for rows in contexts:
        total = {name: [0.0, 0, 0] for name in ["dense", *names]}
        kernels: dict[str, str] = {}
        for shape, count in shapes(hidden, mlp).items():
            for name, (taken, held, multiplied, kernel) in measured(shape, names, dtype, rows, seconds, clock).items():
                total[name] = [
                    old + count * new for old, new in zip(total[name], (taken, held, multiplied), strict=True)
                ]
                kernels[name] = kernel
        dense = total["dense"]
        for name in names:
            bound = dense[1] / total[name][1] if rows == 1 else dense[2] / total[name][2]
            cells[name] += [f"{dense[0] / total[name][0]:.2f} ({bound:.2f})", kernels[name]]
    kind = str(dtype).removeprefix("torch.")
    return [f"| {name} | {kind} | {' | '.join(found)} |" for name, found in cells.items()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 512], help="1 is decoding, more are a prefill")
    parser.add_argument("--seconds", type=float, default=2.0, help="per layer and number of rows")
    parser.add_argument("--thread-time", action="store_true", help="count what the calling thread ran, not what passed")
    given = parser.parse_args()
    clock = CLOCKS[given.thread_time]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {processor()}")
    head = "".join(f" {rows} rows x dense (bound) | kernel |" for rows in given.rows)
    print(f"| format | dtype |{head}\n|{'---|' * (2 + 2 * len(given.rows))}", flush=True)
    for dtype in given.dtypes:
        for line in table(
            given.hidden, given.mlp, given.formats, getattr(torch, dtype), given.rows, given.seconds, clock
        ):
            print(line, flush=True)


def processor() -> str:
    """Name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor()


if __name__ == "__main__":
    main()
