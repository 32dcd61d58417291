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
    "IQ2_XXS": (19, "IQ2_XXS"),
    "IQ2_XS": (20, "IQ2_XS"),
    "Q2_K_S": (21, "Q2_K"),
    "IQ3_XS": (22, "IQ3_S"),
    "IQ3_XXS": (23, "IQ3_XXS"),
    "IQ4_NL": (25, "IQ4_NL"),
    "IQ3_S": (26, "IQ3_S"),
    "IQ3_M": (27, "IQ3_S"),
    "IQ2_S": (28, "IQ2_XS"),
    "IQ2_M": (29, "IQ2_S"),
    "IQ4_XS": (30, "IQ4_XS"),
    "MXFP4_MOE": (38, "MXFP4"),
}
"""Name to the number that GGUF gives it and the block type that most tensors get."""

OTHERS = "Q6_K"
"""The file type by which matrices that no calibration speaks of are stored where a size is asked for."""

FALLBACKS = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
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


KEPT_AT_EIGHT = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K_L", "Q5_K_S", "Q5_K_M", "Q6_K", "Q2_K_S",
)  # fmt: skip
"""File types that leave the attention's output as it is with eight experts; the others give it Q5_K."""
TWO_BITS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
"""File types that have rules of their own, and those of them that get more bits where they matter."""
TWO_BITS_MORE = ("IQ2_S", "IQ2_M")


class _Rules:
    """The rules with what they count as tensors pass in the order of their layers."""

    def __init__(self, file_type: str, model: Model, tied: bool, values: int) -> None:
        self.file, self.model, self.tied, self.values = file_type, model, tied, values
        self.seen = {"v": 0, "down": 0, "gate": 0, "up": 0}

    def type_of(self, shape: Shape) -> str:
        kind, place = FILE_TYPES[self.file][1], _place(shape.name)
        if place == "output" or (place == "embeddings" and self.tied):
            return self._output(kind, shape.axes[-1])
        if self.file == "MXFP4_MOE":
            return kind if len(shape.axes) > 2 and shape.axes[-3] > 1 else "Q8_0"
        if place == "embeddings":
            few = {"IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "IQ3_XXS": "IQ3_S"}
            return few.get(self.file, kind)
        if self.file in TWO_BITS:
            return self._two_bits(kind, place)
        if place in ("v", "qkv", "kv_b"):
            return self._values(kind)
        if place in ("q", "k"):
            few = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
            return "Q8_0" if place == "k" and self.model.experts == 8 else few.get(self.file, kind)
        if place == "down":
            return self._down(kind, shape.name)
        if place == "attn_output":
            return self._attention_output(kind)
        if place in ("gate", "up"):
            at, layers = self._layer(place, shape.name), self.model.layers
            return "IQ3_XXS" if self.file == "IQ3_XS" and layers // 8 <= at < 7 * layers // 8 else kind
        return kind

    def _layer(self, place: str, name: str) -> int:
        at = self.seen[place]
        self.seen[place] += 1
        return _layer(name) if self.model.experts > 1 else at

    def _more(self, layer: int, layers: int) -> bool:
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2

    def _output(self, kind: str, columns: int) -> str:
        if not BLOCK_TYPES[kind].fits(columns) or kind in ("Q8_0", "MXFP4"):
            return "Q8_0"
        return "Q5_K" if self.file in (*TWO_BITS, "IQ3_XXS") else "Q6_K"

    def _two_bits(self, kind: str, place: str) -> str:
        more = "IQ3_S" if self.file in TWO_BITS_MORE else "Q2_K"
        if place in ("v", "qkv", "kv_b"):
            return "Q4_K" if self.model.grouped >= 4 or self.model.experts >= 4 else more
        if place == "k" and self.model.experts == 8:
            return "Q4_K"
        if place == "down":
            at = self.seen["down"]
            self.seen["down"] += 1
            return more if at < self.model.layers // 8 else kind
        if place == "attn_output" and self.model.experts == 8:
            return "Q5_K"
        return "IQ3_S" if place == "attn_output" and self.file in TWO_BITS_MORE else kind

    def _values(self, kind: str) -> str:
        at, file, grouped = self.seen["v"], self.file, self.model.grouped >= 4
        self.seen["v"] += 1
        if file == "Q2_K":
            kind = "Q4_K" if grouped else "Q3_K"
        elif (file in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and grouped) or file == "IQ3_M":
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
        at, file, layers = self._layer("down", name), self.file, self.model.layers
        early = at < layers // 8
        if file == "Q2_K":
            return "Q3_K"
        if file == "Q3_K_M":
            return "Q5_K" if at < layers // 16 else "Q4_K"
        if file == "Q3_K_L":
            return "Q5_K"
        if file in ("Q4_K_M", "Q5_K_M") and self._more(at, layers):
            return "Q6_K"
        if file == "IQ3_M" and self.model.experts == 8 and self._more(at, layers):
            return "Q4_K"
        first = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K", "Q4_0": "Q4_1", "Q5_0": "Q5_1", "IQ3_M": "Q4_K"}
        return first.get(file, kind) if early else kind

    def _attention_output(self, kind: str) -> str:
        if self.model.experts == 8:
            return kind if self.file in KEPT_AT_EIGHT else "Q5_K"
        more = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return more.get(self.file, kind)
