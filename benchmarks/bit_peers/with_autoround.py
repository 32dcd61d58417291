"""AutoRound: with_autoround.py MODEL IDS OUTPUT BITS:GROUP; 50 steps of 2 blocks each, its lighter recipe, on a CPU, in float32: mixed
precision takes five to ten times as long there and changes nothing that counts."""

import sys
from importlib.metadata import version

import torch
from auto_round import AutoRound
from common import save
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, ids, output, setting = sys.argv[1:]
bits, group = map(int, setting.split(":"))
blocks = load_file(ids)["ids"].long()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
rounder = AutoRound(
    model, AutoTokenizer.from_pretrained(folder), bits=bits, group_size=group, sym=False, iters=50, lr=5e-3, batch_size=2,
    nsamples=len(blocks), seqlen=blocks.shape[1], amp=False,
    dataset=[{"input_ids": row[None]} for row in blocks],
)  # fmt: skip
made, settings = rounder.quantize()
found = {n: m.weight.detach() for n, m in made.named_modules() if type(m) is nn.Linear and ".layers." in f".{n}"}
numbers = sum(weight.numel() for weight in found.values())
save(output, found, numbers * bits // 8 + (2 * 8 + bits) * numbers // group // 8, version("auto-round"))
