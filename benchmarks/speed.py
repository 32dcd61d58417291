"""How fast decompositions run beside a product, and `lord` beside a straightforward implementation of SVD-LLM.

    python benchmarks/speed.py                                    # demo, 32 x 1024 tokens, 20 % removed, all cores
    python benchmarks/speed.py --model FOLDER --samples 2 --seqlen 64 --size 256

Rates are nominal multiply-adds times two over the best time: 9 n³ an eigenproblem with vectors, 4 m n² + 22 n³ a thin SVD,
n³ / 3 a Cholesky factor, 2 T n² a Gram of T tokens. The straightforward implementation follows the published steps (arXiv
2403.07378): the whole model in float32, a hook and a Gram for every layer, Cholesky and SVD of every weight, factors saved.
Both run in processes of their own, one after the other, imports, loading and writing included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.calibration.corpus import parse_source
from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.cli.show import quiet_libraries
from lrcompress.foreign.opening import open_dense
from lrcompress.linalg.truncation import decompose
from lrcompress.protocols import InputStatistics
from lrcompress.report.progress import Reporter


def best_seconds(work: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def rates(n: int, tokens: int) -> dict[str, float]:
    """GFLOP/s by name, products first; matrices of size n, weights (n, 3 n) and (3 n, n)."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(n, n, dtype=torch.float64, generator=generator)
    rows = torch.randn(tokens, n, generator=generator)
    gram = rows.double().T @ rows.double() / tokens
    wide, tall = (torch.randn(shape, generator=generator) for shape in ((n, 3 * n), (3 * n, n)))
    big_rows = torch.randn(tokens, 3 * n, generator=generator).double()
    big_gram = big_rows.T @ big_rows / tokens
    statistics, single = InputStatistics.zeros(n), square.float()
    covariance = 2 * n * 3 * n * 3 * n + 2 * n * n * 3 * n
    work: dict[str, tuple[Callable[[], object], float]] = {
        "torch.matmul float64": (lambda: square @ square, 2 * n**3),
        "torch.matmul float32": (lambda: single @ single, 2 * n**3),
        "gram of inputs (float32, summed in float64)": (lambda: statistics.update(rows), 2 * tokens * n * n),
        "eigh float64": (lambda: torch.linalg.eigh(gram), 9 * n**3),
        "cholesky float64": (lambda: torch.linalg.cholesky(gram), n**3 / 3),
        "svd float32": (lambda: torch.linalg.svd(single, full_matrices=False), 26 * n**3),
        "decompose wide, ours (product and eigh)": (lambda: decompose(wide, big_gram), covariance + 9 * n**3),
        "decompose tall, ours (cholesky, eigh, products)": (
            lambda: decompose(tall, gram), n**3 / 3 + 9 * n**3 + 4 * 6 * n**3,
        ),
    }  # fmt: skip
    return {name: flops / best_seconds(run) / 1e9 for name, (run, flops) in work.items()}


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def gather(model: nn.Module, layers: dict[str, nn.Linear], ids: Tensor) -> dict[str, Tensor]:
    """The Gram (in, in) of every layer's inputs, each summed for itself."""
    grams: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + rows.T @ rows

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    for row in ids:
        model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


def scaling(gram: Tensor) -> Tensor:
    """L with L Lᵀ = G; where G is not positive definite, its diagonal grows by its lowest eigenvalue."""
    gram = gram.double()
    factor, failed = torch.linalg.cholesky_ex(gram)
    while int(failed):
        gram = gram + (1e-6 - torch.linalg.eigvalsh(gram)[0]) * torch.eye(len(gram), dtype=gram.dtype)
        factor, failed = torch.linalg.cholesky_ex(gram)
    return factor.float()


@torch.no_grad()
def factorise(layers: dict[str, nn.Linear], grams: dict[str, Tensor], kept: float) -> dict[str, Tensor]:
    """U (out, r) and V (r, in) of every weight, truncated whitened SVDs of `kept` of the numbers."""
    found = {}
    for name, layer in layers.items():
        m, n = layer.weight.shape
        rank, lower = max(1, int(kept * m * n / (m + n))), scaling(grams[name])
        u, s, vt = torch.linalg.svd(layer.weight.float() @ lower, full_matrices=False)
        root = s[:rank].sqrt()
        found[f"{name}.u"] = u[:, :rank] * root
        found[f"{name}.v"] = (root[:, None] * vt[:rank]) @ torch.linalg.inv(lower)
    return found


def straightforward(
    model: str, folder: Path, samples: int, seqlen: int, ratio: float, reporter: Reporter | None = None
) -> None:
    """SVD-LLM's steps on a whole model in memory; its dense part and the factors are saved in bfloat16."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    reporter = reporter or Reporter(quiet=True)
    with reporter.timed("load"):
        opened = open_dense(model)
        text = [(parse_source("python-docs"), samples, seqlen)]
        ids = calibration_blocks(text, opened.tokenizer(), 0, opened.folder).ids
        network = AutoModelForCausalLM.from_pretrained(opened.folder, dtype=torch.float32).eval()
    layers = targets(network)
    with reporter.timed("calibrate"):
        grams = gather(network, layers, ids)
    with reporter.timed("decompose"):
        factors = factorise(layers, grams, 1 - ratio)
    rest = {
        n: t
        for n, t in network.state_dict().items()
        if n.removesuffix(".weight") not in layers and n != "lm_head.weight"
    }
    with reporter.timed("write"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.bfloat16().contiguous() for n, t in {**rest, **factors}.items()}, folder / "model.safetensors")


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--size", type=int, default=1024, help="of the matrices whose rates are measured")
    parser.add_argument(
        "--straightforward", type=Path, metavar="FOLDER", help="run that implementation only, into FOLDER"
    )
    given = parser.parse_args()
    if given.straightforward is not None:
        straightforward(given.model, given.straightforward, given.samples, given.seqlen, given.ratio)
        return
    print(f"{torch.get_num_threads()} threads, matrices of {given.size}")
    for name, rate in rates(given.size, given.size).items():
        print(f"  {name:48}{rate:8.1f} GFLOP/s")
    open_dense(given.model)  # a GGUF file is converted once, for both
    text = ["--samples", str(given.samples), "--seqlen", str(given.seqlen), "--ratio", str(given.ratio)]
    with tempfile.TemporaryDirectory(prefix="lrcompress-speed-") as folder:
        plain = timed([__file__, "--model", given.model, *text, "--straightforward", f"{folder}/plain"])
        ours = timed(["-m", "lrcompress", "compress", given.model, "--method", "lord", *text, "--quiet",
                      "-o", f"{folder}/ours"])  # fmt: skip
        spent = json.loads((Path(folder) / "ours/report.json").read_text())["seconds"]
    parts = ", ".join(f"{key} {value:.1f}" for key, value in spent.items())
    print(f"straightforward SVD-LLM {plain:.1f} s, lord {ours:.1f} s ({parts}): {plain / ours:.2f} times as fast")


if __name__ == "__main__":
    main()
