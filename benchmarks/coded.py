"""How fast do coded weights multiply, and in how much memory are they? python benchmarks/coded.py [--bits 3.1 7]

The linear layers of one block of a 1B Llama (hidden 2048, MLP 8192; 67 M weights, 134 MB in bfloat16: more than any cache
holds) one after the other, dense and coded by turns in one process. Codes are Laplacian, of the bits asked for.
Prints, per dtype, bits and rows of the input, how many times faster than dense: by the medians, by the least times,
and by the least times of all threads' processor time, which other work on the machine disturbs least.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from layers import coded, processor
from torch import Tensor, nn

from lrcompress.formats import StoredLinear, restored
from lrcompress.formats.base import held


def block(hidden: int, mlp: int) -> list[tuple[int, int]]:
    """(out, in) of q, k, v, o, gate, up, down."""
    return [*4 * [(hidden, hidden)], (mlp, hidden), (mlp, hidden), (hidden, mlp)]


def once(layers: list[nn.Module], inputs: dict[int, Tensor]) -> tuple[float, float]:
    """Seconds by the clock and of all threads."""
    start, spent = time.perf_counter(), time.process_time()
    for layer in layers:
        layer(inputs[layer.in_features])  # type: ignore[index]
    return time.perf_counter() - start, time.process_time() - spent


def gains(dense: list[nn.Module], own: list[nn.Module], inputs: dict[int, Tensor], repeats: int) -> list[float]:
    """Dense over own time: medians, least, least of all threads'."""
    found: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for turn in range(repeats + 1):
        for side, layers in enumerate((dense, own)):
            taken = once(layers, inputs)
            if turn:
                found[side].append(taken)
    ways: list[Callable[[list[tuple[float, float]]], float]] = [
        lambda times: statistics.median(clock for clock, _ in times),
        lambda times: min(clock for clock, _ in times),
        lambda times: min(spent for _, spent in times),
    ]
    return [way(found[0]) / way(found[1]) for way in ways]


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=float, default=[2.3, 3.1, 7.0], help="stored, a weight")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=15, help="of one row; a third for many")
    given = parser.parse_args()
    shapes = block(given.hidden, given.mlp)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    print(
        "| dtype | stored bits | bits in memory | rows | x dense, medians | least | least of processor time | kernel |"
    )
    print("|---" * 8 + "|", flush=True)
    for dtype in (getattr(torch, name) for name in given.dtypes):
        with torch.inference_mode(False):
            dense: list[nn.Module] = [
                nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False) for shape in shapes
            ]
        for bits in given.bits:
            with torch.inference_mode(False):
                own: list[nn.Module] = [restored(*coded(shape, bits), dtype) for shape in shapes]
            stored = sum(held(*layer.buffers()) for layer in own) * 8 / sum(m * n for m, n in shapes)
            for rows in given.rows:
                inputs = {n: torch.randn(rows, n).to(dtype) for n in (given.hidden, given.mlp)}
                found = gains(dense, own, inputs, given.repeats if rows == 1 else max(2, given.repeats // 3))
                first = own[0]
                assert isinstance(first, StoredLinear)
                cells = " | ".join(f"{value:.2f}" for value in found)
                name = str(dtype).removeprefix("torch.")
                print(f"| {name} | {bits:g} | {stored:.2f} | {rows} | {cells} | {first.kernel(rows)} |", flush=True)


if __name__ == "__main__":
    main()
