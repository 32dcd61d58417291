"""llama.cpp's own quantisers, every weight of one type: with_ggml.py MODEL IDS OUTPUT TYPE.

The importance of a column is the mean square of its input over IDS, as llama-imatrix has it. Where a row is no multiple
of a type's block the type is the one that llama.cpp falls back to.
"""

import ctypes
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from common import linears, save
from safetensors.torch import load_file

FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
}  # fmt: skip
"""llama-quant.cpp of October 2026, where a row is no multiple of 256."""


def importances(model: torch.nn.Module, layers: dict[str, torch.nn.Linear], ids: torch.Tensor) -> dict[str, np.ndarray]:
    """(in,) mean squares of every layer's input."""
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}

    def adding(total: torch.Tensor) -> Callable[..., None]:
        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            total.add_(args[0].flatten(0, -2).square().sum(0, dtype=torch.float64))

        return add

    for name, layer in layers.items():
        layer.register_forward_pre_hook(adding(sums[name]))
    with torch.no_grad():
        for row in ids:
            model.model(row[None])
    return {name: (total / ids.numel()).float().numpy() for name, total in sums.items()}


folder, ids, output, setting = sys.argv[1:]
found_at = find_spec("xllamacpp")
assert found_at is not None
assert found_at.origin is not None
library = ctypes.CDLL(str(next(Path(found_at.origin).parent.glob("xllamacpp*.so"))))
library.ggml_quantize_init.argtypes = [ctypes.c_int]
quantize = library.ggml_quantize_chunk
quantize.restype = ctypes.c_size_t
quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
model, layers = linears(folder)
known = Path(output).with_name("importances.npz")
if not known.exists():
    np.savez(known, **importances(model, layers, load_file(ids)["ids"].long()))
sizes = dict(np.load(known))  # the arrays must live as long as their addresses are used
found, stored = {}, 0
for name, layer in layers.items():
    kind = gguf.GGMLQuantizationType[setting]
    rows, columns = layer.weight.shape
    if columns % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType[FALLBACK[setting]]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    library.ggml_quantize_init(int(kind))
    weight = np.ascontiguousarray(layer.weight.detach().numpy())
    made = np.empty(rows * columns // block * size, dtype=np.uint8)
    written = quantize(int(kind), weight.ctypes.data, made.ctypes.data, 0, rows, columns, sizes[name].ctypes.data)
    assert written == made.nbytes
    found[name] = torch.from_numpy(gguf.quants.dequantize(made.reshape(rows, -1), kind).copy())
    stored += made.nbytes
save(output, found, stored, version("xllamacpp"))
