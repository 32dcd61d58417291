"""GPTQModel: with_gptqmodel.py MODEL IDS OUTPUT BITS:GROUP."""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it loads nothing with the one that it takes on two cores

from common import linears, save
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file

folder, ids, output, setting = sys.argv[1:]
bits, group = map(int, setting.split(":"))
rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in load_file(ids)["ids"]]
_, layers = linears(folder)
shapes = {name: layer.weight.shape for name, layer in layers.items()}
model = GPTQModel.load(folder, QuantizeConfig(bits=bits, group_size=group), device="cpu")
model.quantize(rows, batch_size=1)
stored, parts = 0, {}
with tempfile.TemporaryDirectory() as saved:
    model.save(saved)
    for path in Path(saved).glob("*.safetensors"):
        parts |= load_file(path)
    # Loaded again: what was just quantised lies on the disk, without numbers in memory.
    loaded = GPTQModel.load(saved, device="cpu", backend=BACKEND.TORCH).model
for name in shapes:
    own = {key.rsplit(".", 1)[1]: tensor for key, tensor in parts.items() if key.startswith(f"{name}.")}
    # An ordering of the columns that is the plain one is not needed to read the weight.
    stored += sum(tensor.nbytes for key, tensor in own.items() if key != "g_idx")
modules = {name: module for name, module in loaded.named_modules() if name in shapes}
found = {name: module.dequantize_weight().T.float().reshape(shapes[name]) for name, module in modules.items()}
save(output, found, stored, version("gptqmodel"))
