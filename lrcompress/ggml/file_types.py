"""Which block type each tensor of a GGUF file gets when a file type such as Q4_K_M is asked for.

The rules are llama-quantize's with an importance matrix (llama-quant.cpp of llama.cpp, October 2026), by the names that
GGUF gives tensors, but for two architectures that it treats by their names. Types of tensors decide a file's size.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lrcompress.errors import InputError, nearest
from lrcompress.ggml.types import BLOCK_TYPES

FILE_TYPES: dict[str, tuple[int, str]] = {
    "Q4_0": (2, "Q4_0"),
    "Q4_1": (3, "Q4_1"),
    "Q8_0": (7, "Q8_0"),
    "Q5_0": (8, "Q5_0"),
    "Q5_1": (9, "Q5_1"),
    "Q2_K": (10, "Q2_K"),
    "Q3_K_S": (11, "Q3_K"),
    "Q3_K_M": (12, "Q3_K"),
    "Q3_K_L": (13, "Q3_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_K_M": (15, "Q4_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q6_K": (18, "Q6_K"),
    "Q2_K_S": (21, "Q2_K"),
    "IQ4_NL": (25, "IQ4_NL"),
    "IQ4_XS": (30, "IQ4_XS"),
}
"""Name to the number that GGUF gives it and the block type that most tensors get."""

OTHERS = "Q6_K"
"""The file type by which matrices that no calibration speaks of are stored where a size is asked for."""

FALLBACKS = {"IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Where rows are no multiple of 256."""

LEFT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
"""Parts of the names of matrices that are never rounded, beside those that must be whole names."""
LEFT_WHOLE = ("position_embd.weight", "token_types.weight")

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT = "output.weight"
ATTENTION = (
    ("attn_qkv.weight", "qkv"), ("attn_kv_b.weight", "kv_b"), ("attn_v.weight", "v"), ("attn_k.weight", "k"),
    ("attn_q.weight", "q"), ("attn_output.weight", "attn_output"), ("ffn_up", "up"), ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)  # fmt: skip
"""Part of a name and what it says of the tensor's place."""


@dataclass(frozen=True)
class Model:
    """What the rules ask of a model: layers, heads per group of keys and values, experts a layer (0 or 1: none)."""

    layers: int
    grouped: int = 1
    experts: int = 0
    large: bool = False
    """80 layers of grouped heads in a llama: what llama.cpp calls 70B."""


@dataclass(frozen=True)
class Shape:
    """A tensor of a file: its name, and its axes from the outermost to the numbers of a row."""

    name: str
    axes: tuple[int, ...]


def check_file_type(name: str) -> str:
    """The name as FILE_TYPES has it; InputError where it is unknown."""
    if name.upper() not in FILE_TYPES:
        raise InputError(f"--type {name} is unknown: {nearest(name.upper(), list(FILE_TYPES))}")
    return name.upper()


def is_rounded(shape: Shape) -> bool:
    """Whether llama-quantize rounds the tensor at all."""
    name = shape.name
    if len([axis for axis in shape.axes if axis != 1]) < 2 and len(shape.axes) < 2:
        return False
    return (
        len(shape.axes) > 1
        and name.endswith("weight")
        and name not in LEFT_WHOLE
        and not any(part in name for part in LEFT)
    )


def types_of(file_type: str, shapes: Sequence[Shape], model: Model) -> dict[str, str | None]:
    """Block type by tensor name, F16 where rows fit no block; None for what is left as it is."""
    tied = all(shape.name != OUTPUT for shape in shapes)
    rules = _Rules(file_type, model, tied, sum(_place(s.name) in ("v", "qkv", "kv_b") for s in shapes))
    found: dict[str, str | None] = {}
    for shape in sorted(shapes, key=lambda shape: (_layer(shape.name), shape.name)):
        found[shape.name] = fitting(rules.type_of(shape), shape.axes[-1]) if is_rounded(shape) else None
    return found


def fitting(kind: str, columns: int) -> str:
    """The block type, or what it falls back to for rows of so many numbers."""
    if BLOCK_TYPES[kind].fits(columns):
        return kind
    kind = FALLBACKS.get(kind, kind)
    return kind if BLOCK_TYPES[kind].fits(columns) else "F16"


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match.group(1)) if match else -1


def _place(name: str) -> str:
    if name == OUTPUT:
        return "output"
    if name in EMBEDDINGS:
        return "embeddings"
    return next((place for part, place in ATTENTION if part in name), "other")


class _Rules:
    """The rules with what they count as tensors pass in the order of their layers."""

    def __init__(self, file_type: str, model: Model, tied: bool, values: int) -> None:
        self.file, self.model, self.tied, self.values = file_type, model, tied, values
        self.seen = {"v": 0, "down": 0}

    def type_of(self, shape: Shape) -> str:
        kind, place = FILE_TYPES[self.file][1], _place(shape.name)
        if place == "output" or (place == "embeddings" and self.tied):
            if not BLOCK_TYPES[kind].fits(shape.axes[-1]) or kind == "Q8_0":
                return "Q8_0"
            return "Q6_K"
        if place in ("v", "qkv", "kv_b"):
            return self._values(kind)
        if place == "k" and self.model.experts == 8:
            return "Q8_0"
        if place == "down":
            return self._down(kind, shape.name)
        if place == "attn_output":
            return self._attention_output(kind)
        return kind

    def _more(self, layer: int, layers: int) -> bool:
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2

    def _values(self, kind: str) -> str:
        at, file, grouped = self.seen["v"], self.file, self.model.grouped >= 4
        self.seen["v"] += 1
        if file == "Q2_K":
            kind = "Q4_K" if grouped else "Q3_K"
        elif file == "Q2_K_S" and grouped:
            kind = "Q4_K"
        elif file == "Q3_K_M":
            kind = "Q5_K" if at < 2 else "Q4_K"
        elif file == "Q3_K_L" or (file in ("IQ4_NL", "IQ4_XS") and grouped):
            kind = "Q5_K"
        elif file in ("Q4_K_M", "Q5_K_M") and self._more(at, self.values):
            kind = "Q6_K"
        elif file == "Q4_K_S" and at < 4:
            kind = "Q5_K"
        if self.model.large and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        return "Q8_0" if self.model.experts == 8 else kind

    def _down(self, kind: str, name: str) -> str:
        at = _layer(name) if self.model.experts > 1 else self.seen["down"]
        self.seen["down"] += 1
        file, layers = self.file, self.model.layers
        early = at < layers // 8
        if file == "Q2_K":
            return "Q3_K"
        if file == "Q3_K_M":
            return "Q5_K" if at < layers // 16 else "Q4_K"
        if file == "Q3_K_L":
            return "Q5_K"
        if file in ("Q4_K_M", "Q5_K_M") and self._more(at, layers):
            return "Q6_K"
        first = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K", "Q4_0": "Q4_1", "Q5_0": "Q5_1"}
        return first.get(file, kind) if early else kind

    def _attention_output(self, kind: str) -> str:
        if self.model.experts == 8:
            few = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
            return "Q5_K" if self.file in few else kind
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.file, kind)
