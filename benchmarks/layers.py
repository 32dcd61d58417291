"""How fast is a single compressed layer against nn.Linear? python benchmarks/layers.py [--seconds 0.5]

Random weights, the rank that removes the fraction from the bytes; low_rank, pivoted and dense are timed by turns.
Prints the median microseconds of dense, then for both formats how many times faster they are, the spread
(p90 - p10) / median of their times, and the bound: dense over compressed multiply-adds.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.coding import estimated_bits
from lrcompress.evaluation.bench import spread
from lrcompress.formats import StoredLinear, build, spec_bytes
from lrcompress.formats.coded import Coded, Scales
from lrcompress.protocols import Spec

SHAPES = [(576, 576), (1536, 576), (2048, 2048), (8192, 2048)]
"""(out, in)."""
REMOVED = [0.2, 0.5]
BATCHES = [1, 512]
DTYPES = [torch.float32, torch.bfloat16]


def largest_spec(name: str, shape: tuple[int, int], removed: float) -> Spec:
    """The spec of the largest rank that removes at least this fraction of the 16-bit bytes."""
    specs = (Spec(name, shape, parameters={"rank": rank}) for rank in range(min(shape) - 1, 0, -1))
    return next(s for s in specs if spec_bytes(s, 2) <= (1 - removed) * shape[0] * shape[1] * 2)


def layer(spec: Spec, dtype: torch.dtype) -> StoredLinear:
    """Random factors of moderate size, for pivoted in an order that moves every output."""
    generator = torch.Generator().manual_seed(0)
    module = build(spec, dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    if "order" in module.state_dict():
        module.order.copy_(torch.randperm(spec.shape[0], generator=generator))
    return module


@cache
def coded(shape: tuple[int, int], bits: float) -> tuple[Spec, dict[str, Tensor]]:
    """Laplacian codes of about so many bits a weight, their rows and columns of sizes that differ by octaves."""
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.exp2(0.8 * torch.randn(n, generator=generator)) for n in shape]
    drawn = torch.rand(shape, generator=generator) - 0.5
    drawn = -drawn.sign() * torch.log1p(-2 * drawn.abs().clamp(max=0.499999)) * sizes[0][:, None] * sizes[1]
    low, high = 2.0**-6, 2.0**12
    part = drawn[:: max(1, shape[0] // 256)]
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        fewer = estimated_bits((middle * part).round().int()) < bits * part.numel()
        low, high = (middle, high) if fewer else (low, middle)
    scales = Scales.nearest(shape[1] ** -0.5 / sizes[0] / low, 1 / sizes[1])
    stored = Coded.encode((low * drawn).round().int(), scales, None)
    return Spec("coded", shape, parameters={"length": len(stored["stream"])}), {"weight": torch.empty(0), **stored}


def timed(runs: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, the runs by turns; the first two of each do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["dense"]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="per row of the table")
    seconds = parser.parse_args().seconds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {processor()}")
    names = ["low_rank", "pivoted"]
    head = "".join(f" {name} x | spread | bound |" for name in names)
    print(f"| out x in | removed | dtype | batch | dense us |{head}\n|{'---|' * 11}")
    for shape in SHAPES:
        for removed in REMOVED:
            specs = {name: largest_spec(name, shape, removed) for name in names}
            for dtype in DTYPES:
                with torch.inference_mode(False):  # as loaded weights are: no inference tensors
                    modules = {name: layer(spec, dtype).requires_grad_(False) for name, spec in specs.items()}
                    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False)
                for batch in BATCHES:
                    x = torch.randn(1, batch, shape[1], dtype=dtype)
                    times = timed({n: partial(m, x) for n, m in {"dense": dense, **modules}.items()}, seconds)
                    median = {name: statistics.median(found) for name, found in times.items()}
                    cells = "".join(
                        f" {median['dense'] / median[n]:.2f} | {spread(times[n]):.0%} |"
                        f" {dense.weight.numel() / m.multiply_adds(batch):.2f} |"
                        for n, m in modules.items()
                    )
                    kind = str(dtype).removeprefix("torch.")
                    print(
                        f"| {shape[0]}x{shape[1]} | {removed:.0%} | {kind} | {batch} | {1e6 * median['dense']:.0f} |{cells}"
                    )


def processor() -> str:
    """Name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor()


if __name__ == "__main__":
    main()
