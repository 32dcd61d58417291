#!/usr/bin/env python3
"""Whether the ranking of the methods holds on other architectures: small models, trained here on a text, swept.

Every model is trained on the first nine tenths of the text (next token, AdamW), calibrated on the same part and
measured on the last tenth. Prints a Markdown table per model; results stay in --work.

usage: toys.py --text FILE --work DIR [--architectures gpt2 qwen3 ...] [--methods auto lord ...] [--ratios 0.2 0.5]
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lrcompress.recipe import Sweep, validated
from lrcompress.report.progress import Reporter
from lrcompress.sweep import sweep

VOCABULARY, LENGTH = 512, 128
WIDTHS = {
    "gpt2": {"n_embd": 192, "n_layer": 6, "n_head": 6, "n_positions": 256},
    "gpt_neox": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6},
    "qwen3": {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
    },
    "opt": {
        "hidden_size": 192, "ffn_dim": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
        "word_embed_proj_dim": 192, "max_position_embeddings": 256,
    },
}  # fmt: skip


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def train(architecture: str, text: str, folder: Path, steps: int, batch: int) -> None:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(text)
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=1, **WIDTHS[architecture]
    )
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.tensor(tokenizer(text).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (batch,))
        rows = torch.stack([ids[s : s + LENGTH] for s in starts])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"{architecture}: step {step + 1}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", default=["gpt2", "qwen3"], choices=list(WIDTHS))
    parser.add_argument("--methods", nargs="+", default=["auto", "cospadi", "lord", "welore"], help="YAML")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--limit", type=int, default=64)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.text.read_text(encoding="utf8")
    cut = len(text) * 9 // 10
    known, held_out = args.work / "known.txt", args.work / "held_out.txt"
    known.write_text(text[:cut], encoding="utf8")
    held_out.write_text(text[cut:], encoding="utf8")
    print(f"`{' '.join(sys.argv)}`; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for architecture in args.architectures:
        folder = args.work / architecture
        start = time.perf_counter()
        if not (folder / "config.json").exists():
            train(architecture, text[:cut], folder, args.steps, args.batch)
        data = {
            "model": str(folder),
            "methods": [yaml.safe_load(method) for method in args.methods],
            "ratios": args.ratios,
            "calibration": [{"source": str(known), "samples": args.samples, "seqlen": LENGTH}],
            "evaluate": {"tasks": [f"tokens:{held_out}@{LENGTH}"], "limit": args.limit},
            "output": str(args.work / f"{architecture}-sweep"),
        }
        found = sweep(validated(Sweep, data, "toys.py"), reporter=Reporter(quiet=True))
        (dense,) = found["dense"]["results"].values()
        print(
            f"\n{architecture}, trained {args.steps} steps; dense {dense['token_perplexity']:.2f}; {time.perf_counter() - start:.0f} s\n"
        )
        print("| method | " + " | ".join(f"{ratio:.0%}" for ratio in args.ratios) + " |")
        print("|---" * (len(args.ratios) + 1) + "|")
        for method in dict.fromkeys(point["method"] for point in found["points"]):
            rows = {p["ratio"]: next(iter(p["results"].values())) for p in found["points"] if p["method"] == method}
            print(f"| {method} | " + " | ".join(f"{rows[r]['token_perplexity']:.2f}" for r in args.ratios) + " |")


if __name__ == "__main__":
    main()
