"""How fast are the codes of a sparse dictionary as a sparse matrix? python benchmarks/sparse_product.py

Times y = z Sᵀ for S (out, k) with s nonzeros a row: dense, as torch's compressed sparse rows, and gathered
(embedding_bag). Prints microseconds, and how many times faster than dense the others are.
"""

import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

SHAPES = [(2048, 2048), (576, 1536), (1536, 576)]
"""(out, in); the dictionary is as large as half of the dense bytes pay for."""
SPARSITY = [2, 3, 4, 8, 16]
BATCHES = [1, 16, 128]
SECONDS = 0.25


def codes(out: int, atoms: int, nonzeros: int) -> Tensor:
    """Random codes (out, atoms) with `nonzeros` a row."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(out, atoms, generator=generator).topk(nonzeros, dim=1).indices.sort().values
    return torch.zeros(out, atoms).scatter_(1, chosen, torch.randn(out, nonzeros, generator=generator))


def microseconds(run: Callable[[], Tensor]) -> float:
    """The best of many calls."""
    run()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return 1e6 * best


def products(dense: Tensor, nonzeros: int, latent: Tensor) -> dict[str, Callable[[], Tensor]]:
    """z Sᵀ in every way, z (batch, k)."""
    compressed = dense.to_sparse_csr()
    rows = torch.sparse_csr_tensor(compressed.crow_indices().int(), compressed.col_indices().int(), compressed.values())
    where = compressed.col_indices().view(-1, nonzeros)
    values = compressed.values().view(-1, nonzeros)
    return {
        "dense": lambda: nn.functional.linear(latent, dense),
        "csr": lambda: (rows @ latent.T).T,
        "gather": lambda: (
            nn.functional.embedding_bag(where, latent.T.contiguous(), per_sample_weights=values, mode="sum").T
        ),
    }


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {processor()}")
    print(
        "| out x in | k/s | k | batch | dense us | csr us | x | gather us | x |\n|---|---|---|---|---|---|---|---|---|"
    )
    for out, features in SHAPES:
        for ratio in SPARSITY:
            nonzeros = int(0.5 * out * features / (ratio * features + out * (1 + ratio / 16)))
            dense = codes(out, ratio * nonzeros, nonzeros)
            for batch in BATCHES:
                ways = products(dense, nonzeros, torch.randn(batch, ratio * nonzeros))
                expected = ways["dense"]()
                times = {}
                for name, run in ways.items():
                    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
                    times[name] = microseconds(run)
                gains = [f"{times[n]:.0f} | {times['dense'] / times[n]:.2f}" for n in ("csr", "gather")]
                print(f"| {out} x {features} | {ratio} | {ratio * nonzeros} | {batch} | {times['dense']:.0f} | "
                      f"{' | '.join(gains)} |")  # fmt: skip


def processor() -> str:
    """The processor's name, where the system says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
