#!/usr/bin/env python3
"""What `squeeze`, `merge` and `extract` cost real adapters: LoRA trained on several texts, judged by perplexity.

A LoRA of --rank on every linear layer of the model is trained on the first nine tenths of each text, for --steps of --batch
rows. Then each is squeezed to every rank of --squeeze, and all together are merged into bases of every size of --bases and
extracted again. Perplexity is that of the last tenth of each adapter's own text, at most --limit blocks. Trained adapters
stay in --work and are not trained again. Prints Markdown tables.

usage: adapters.py --texts FILE... --work DIR [--model demo] [--rank 16] [--squeeze 8 4 2] [--bases 2 1]
"""

import argparse
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrcompress.calibration.corpus import cut_blocks, documents, parse_source, split_held_out, tokenise
from lrcompress.foreign.opening import open_dense


def cli(*args: object) -> None:
    subprocess.run([sys.executable, "-m", "lrcompress", *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def rows(text: str, tokenizer: object, length: int) -> tuple[Tensor, Tensor]:
    """(rows, length) to train on, and held out."""
    train, held = split_held_out(tokenise(documents(parse_source(text)), tokenizer))
    return cut_blocks(train, length, ()), cut_blocks(held, length, ())


def train(args: argparse.Namespace, folder: Path, text: str, tokenizer: object, into: Path) -> None:
    if into.exists():
        return
    torch.manual_seed(0)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr, weight_decay=0.0)
    ids = rows(text, tokenizer, args.length)[0]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    for step in range(args.steps):
        batch = ids[[int(order[(step * args.batch + i) % len(ids)]) for i in range(args.batch)]]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(into)


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in ids]
    return math.exp(sum(losses) / len(losses))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--squeeze", nargs="*", type=int, default=[8, 4, 2])
    parser.add_argument("--bases", nargs="*", type=int, default=[2, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, default=32)
    args = parser.parse_args()
    opened = open_dense(args.model)
    tokenizer, folder = opened.tokenizer(), opened.folder
    names = [Path(text.split(":")[0]).stem for text in args.texts]
    held = {
        name: rows(text, tokenizer, args.length)[1][: args.limit] for name, text in zip(names, args.texts, strict=True)
    }
    for name, text in zip(names, args.texts, strict=True):
        train(args, folder, text, tokenizer, args.work / name)

    def judged(adapters: list[Path | None]) -> str:
        found = []
        for name, adapter in zip(names, adapters, strict=True):
            model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
            found.append(perplexity(model.eval(), held[name]))
        return " | ".join(f"{value:.2f}" for value in found)

    print(
        f"`{' '.join(sys.argv)}`; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n"
    )
    print(f"| adapters | {' | '.join(names)} | bytes together | relative errors |")
    print("|---" * (3 + len(names)) + "|")
    print(f"| none | {judged([None] * len(names))} | | |", flush=True)
    whole = [args.work / name for name in names]
    print(f"| rank {args.rank}, trained | {judged(list(whole))} | {sum(map(weight_bytes, whole))} | |", flush=True)
    for rank in args.squeeze:
        small, errors = [args.work / f"{name}-{rank}" for name in names], []
        for one, squeezed in zip(whole, small, strict=True):
            cli(
                "squeeze",
                one,
                "--rank",
                rank,
                "--per-module-ranks",
                "-o",
                squeezed,
                "--overwrite",
                "--json",
                args.work / "squeezed.json",
            )
            errors.append(json.loads((args.work / "squeezed.json").read_text())["relative_error"])
        shown = " ".join(f"{error:.3f}" for error in errors)
        print(
            f"| squeezed to mean rank {rank} | {judged(list(small))} | {sum(map(weight_bytes, small))} | {shown} |",
            flush=True,
        )
    for size in args.bases:
        shared, back = args.work / f"basis-{size}", [args.work / f"{name}-of-{size}" for name in names]
        cli("merge", *whole, "--basis", size, "-o", shared, "--overwrite", "--json", args.work / "merged.json")
        for name, extracted in zip(names, back, strict=True):
            cli("extract", shared, "--task", name, "-o", extracted, "--overwrite")
        errors = {t["name"]: t["relative_error"] for t in json.loads((args.work / "merged.json").read_text())["tasks"]}
        shown = " ".join(f"{errors[name]:.3f}" for name in names)
        print(
            f"| extracted from a basis of {size} | {judged(list(back))} | {weight_bytes(shared)} | {shown} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
