"""Peak resident memory of `lrcompress compress` at two depths of one width, every run in a process of its own.

    python benchmarks/memory.py --folder /tmp/used --used demo          # of loading and using a model in every format instead
    python benchmarks/memory.py --folder /tmp/used --used demo --formats semi_sparse coded --also /tmp/auto-3.1
    python benchmarks/memory.py --folder /tmp/deep                      # hidden 2048, MLP 8192, 24 and 48 blocks
    python benchmarks/memory.py --folder /tmp/deep --hidden 512 --mlp 2048 --depths 6 24 --methods lord auto eora cospadi
    python benchmarks/memory.py --folder /tmp/deep --every 6            # compress every sixth block's weights only

Checkpoints are random, bfloat16, in shards of 1 GB, and written a tensor at a time; they stay in the folder for the next run.
"""

import argparse
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from stored import FORMATS
from torch import Tensor

from lrcompress.checkpoint.folder import read_sound_config
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.writer import ShardedWriter
from lrcompress.evaluation.loading import load_network
from lrcompress.foreign.opening import open_model
from lrcompress.kernels.native import WITHOUT, library
from lrcompress.model.skeleton import empty_model

RUNS = {
    "lord": [],
    "welore": [],
    "auto": [],
    "cospadi": ["--set", "rounds=1"],
    "eora": ["--base", "rtn:4:64"],
    "lord-sequential": ["--set", "propagation=sequential"],
}
"""What is measured: a method, a dash and a remark, and options; fewer rounds need no less memory."""


def generate(folder: Path, hidden: int, mlp: int, blocks: int, vocabulary: int, shard_bytes: int = 10**9) -> Path:
    """A random Llama with grouped queries in `folder`, with a tokenizer of bytes; made once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    heads = max(2, hidden // 64)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), vocab_size=vocabulary, tie_word_embeddings=True, dtype="bfloat16",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    state = empty_model(config).state_dict()
    planned = [
        (name, torch.empty_like(t, dtype=torch.bfloat16)) for name, t in state.items() if name != "lm_head.weight"
    ]
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, meta in planned:
            scale = meta.shape[-1] ** -0.5
            found = torch.ones(meta.shape) if meta.dim() == 1 else torch.randn(meta.shape, generator=generator) * scale
            yield name, found.bfloat16()

    writer = ShardedWriter(folder, planned, shard_bytes)
    writer.write(tensors())
    writer.close()
    pieces = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def peak(model: Path, output: Path, run: str, samples: int, seqlen: int, blocks: range) -> tuple[int, dict]:
    """Bytes that one compression of `blocks` had resident at most, counted by the system, and its report."""
    command = [sys.executable, "-m", "lrcompress", "compress", str(model), "--method", run.split("-")[0], *RUNS[run],
               "--ratio", "0.6" if run == "eora" else "0.2", "-o", str(output), "--overwrite", "--quiet",
               "--calibration", "python-docs", "--samples", str(samples), "--seqlen", str(seqlen),
               "--target", rf"re:layers\.({'|'.join(map(str, blocks))})\."]  # fmt: skip
    code = "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); " \
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024, json.loads((output / "report.json").read_text())


@dataclass(frozen=True)
class Used:
    """Bytes: of the tensors in files as they are held in memory, and what a process grew by, at most while it loaded and
    at the end; it generated four tokens."""

    held: int
    grown: int
    peak: int


def used(folder: Path, dtype: str) -> Used:
    """Measured in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--measure", str(folder), "--dtypes", dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Used(**json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, dtype: str) -> Used:
    """`used` in this process, which should have loaded nothing yet."""
    empty_model(read_sound_config(folder))  # imports the architecture's code
    for name in WITHOUT:
        library(name)  # compiled beforehand
    element = getattr(torch, dtype).itemsize
    reader = CheckpointReader(folder)
    tensors = [reader.meta(name) for name in reader.names()]
    held = sum(t.numel() * (element if t.is_floating_point() else t.itemsize) for t in tensors)
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    seen, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            seen.append(process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    _, model = load_network(str(folder), device="cpu", dtype=dtype)
    with torch.inference_mode():
        model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    over.set()
    watching.join()
    gc.collect()
    return Used(held, process.memory_info().rss - before, max(seen) - before)


def compare_used(folder: Path, label: str, names: list[str], also: list[Path], dtypes: list[str]) -> None:
    """Print a table: dense and the model's shapes in every format, side by side."""
    from whole import compressed

    dense = open_model(label).folder
    rows = {}
    for name in ["dense", *names]:
        rows[name] = compressed(dense, folder / name.replace(" ", "-").replace(":", "-"), name, 0.5)
    rows |= {path.name: path for path in also}
    print(f"torch {torch.__version__}, {label}, MB; growth may be 1.10 x held + 120, and its peak 1.3 x that")
    print("| format | dtype | held | growth | allowed | peak | allowed |\n|---|---|---|---|---|---|---|", flush=True)
    for dtype in dtypes:
        for name, path in rows.items():
            found = used(path, dtype)
            allowed = 1.10 * found.held + 120e6
            cells = (found.held, found.grown, allowed, found.peak, 1.3 * allowed)
            print(f"| {name} | {dtype} | {' | '.join(f'{cell / 1e6:.0f}' for cell in cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--depths", type=int, nargs=2, default=[24, 48])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--every", type=int, default=1, help="only the weights of every so many blocks are compressed")
    parser.add_argument("--methods", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--used", metavar="MODEL", help="measure loading and using it in every format")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--also", nargs="+", type=Path, default=[], help="checkpoints measured beside them")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(asdict(measure(given.measure, given.dtypes[0]))))
        return
    if given.used is not None:
        compare_used(given.folder, given.used, given.formats, given.also, given.dtypes)
        return
    few, many = given.depths
    print(f"{'run':18}{few:>6} blocks{many:>8} blocks    growth  predicted  seconds")
    for run in given.methods:
        found = []
        for depth in (few, many):
            name = f"random-{given.hidden}-{given.mlp}-{depth}"
            model = generate(given.folder / name, given.hidden, given.mlp, depth, given.vocabulary)
            found.append(
                peak(
                    model,
                    given.folder / f"{name}-{run}",
                    run,
                    given.samples,
                    given.seqlen,
                    range(0, depth, given.every),
                )
            )
        (first, _), (second, report) = found
        predicted = report.get("needs", {}).get("memory_bytes", 0)
        print(
            f"{run:18}{first / 1e6:>10.0f} MB{second / 1e6:>12.0f} MB{second / first - 1:>+10.1%}"
            f"{predicted / 1e6:>8.0f} MB{report['seconds']['total']:>8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
