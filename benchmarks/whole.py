"""How fast is a whole compressed model of realistic shape? Random weights, written in the stored formats and benched.

    python benchmarks/whole.py --folder /tmp/whole                     # hidden 2048, MLP 8192, 16 blocks: a 1B model
    python benchmarks/whole.py --folder /tmp/whole --formats pivoted --removed 0.5 --context 512
    python benchmarks/whole.py --folder /tmp/whole --blocks 2 --formats coded --removed 0.80625 0.5625  # 3.1 and 7 bits

Every linear weight of the blocks is stored in the format; where that has a rank, or bits, those that remove the fraction of
its bytes. Numbers are random (benchmarks/stored.py). Dense and compressed are timed by turns in one process (`lrcompress bench`).
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from layers import processor
from memory import generate
from stored import FORMATS, spec_of, state
from torch import Tensor

from lrcompress.checkpoint.manifest import Manifest
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside
from lrcompress.evaluation.bench import BenchSpec, bench
from lrcompress.formats import stored_tensors
from lrcompress.protocols import Spec


def compressed(dense: Path, folder: Path, name: str, removed: float) -> Path:
    """A checkpoint in bfloat16 like `dense` whose blocks' linear weights are random ones in format `name`; made once.

    With the name `dense` they are what they were.
    """
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader = CheckpointReader(dense)
    specs: dict[str, Spec] = {}
    for key in reader.names():
        shape = tuple(reader.meta(key).shape)
        if key.endswith("_proj.weight") and name != "dense":
            specs[key.removesuffix(".weight")] = spec_of(name, shape, removed)  # type: ignore[arg-type]
    planned = []
    for key in reader.names():
        spec = specs.get(key.removesuffix(".weight"))
        own = {"weight": reader.meta(key).bfloat16()} if spec is None else stored_tensors(spec, torch.bfloat16)
        stem = key.removesuffix("weight")
        planned += [(stem + leaf, tensor) for leaf, tensor in own.items()]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key in reader.names():
            spec, stem = specs.get(key.removesuffix(".weight")), key.removesuffix("weight")
            if spec is None:
                yield key, reader.tensor(key).bfloat16()
            else:
                made = state(name, spec.shape, torch.bfloat16, removed)
                yield from ((stem + leaf, made[leaf]) for leaf in stored_tensors(spec, torch.bfloat16))

    writer = ShardedWriter(folder, planned, 10**9)
    writer.write(tensors())
    writer.close()
    copy_files_beside(dense, folder, code=False)
    config = json.loads((dense / "config.json").read_text())
    if specs:
        config["quantization_config"] = Manifest("lord", specs).as_json()
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS, "coded"], default=["low_rank", "pivoted"])
    parser.add_argument(
        "--removed", nargs="+", type=float, default=[0.2, 0.5], help="by formats that have a rank, or coded"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--context", nargs="+", type=int, default=[512])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    name = f"random-{given.hidden}-{given.mlp}-{given.blocks}"
    dense = generate(given.folder / name, given.hidden, given.mlp, given.blocks, given.vocabulary)
    spec = BenchSpec(tuple(given.batch), tuple(given.context), given.new_tokens, given.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    print(
        "| format | removed | dtype | phase | batch | context | dense tokens/s | speedup | bound | spread | memory MB |"
    )
    print("|---" * 11 + "|", flush=True)
    for stored in given.formats:
        for removed in given.removed:
            folder = compressed(dense, given.folder / f"{name}-{stored.replace(' ', '-')}-{removed:g}", stored, removed)
            for dtype in given.dtypes:
                found = bench(str(folder), spec, str(dense), dtype=dtype)
                for row in found["rows"]:
                    print(
                        f"| {stored} | {removed:.0%} | {dtype} | {row['phase']} | {row['batch']} | {row['context']} "
                        f"| {row['dense_tokens_per_s']:.1f} | {row['speedup']:.2f} | {row['bound']:.2f} | {row['spread']:.0%} "
                        f"| {found['rss_bytes']['compressed'] / 1e6:.0f} of {found['rss_bytes']['dense'] / 1e6:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
