"""HQQ: with_hqq.py MODEL IDS OUTPUT BITS:GROUP; uses no text."""

import sys
from importlib.metadata import version

import torch
from common import linears, save
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

folder, _, output, setting = sys.argv[1:]
bits, group = map(int, setting.split(":"))
config = BaseQuantizeConfig(nbits=bits, group_size=group)
model, layers = linears(folder)
found, stored = {}, 0
for name, layer in layers.items():
    numbers = layer.weight.numel()
    made = HQQLinear(layer, quant_config=config, compute_dtype=torch.float32, device="cpu", del_orig=False)
    found[name] = made.dequantize().float().reshape(layer.weight.shape)
    # 16-bit scale and zero point a group; the codes at their bits, not in the 32 bits for ten that the package takes for 3.
    stored += numbers * bits // 8 + 4 * (numbers // group)
save(output, found, stored, version("hqq"))
