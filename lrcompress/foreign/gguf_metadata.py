"""Metadata of a GGUF file that says what the model computes: into the config, or the file is refused in words.

transformers takes some keys and drops the others without a word. Here every key of the architecture's own is accounted
for: it goes where the config has a place for it, or says what the config says anyway, or changes nothing. What a key
means is llama.cpp's word (gguf-py/gguf/constants.py, src/llama-model.cpp).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lrcompress.errors import InputError

CLOSE = 1e-4
"""How much two numbers may differ relative to their size: the file's are float32, made by another program."""

ROTARY = "rope."
"""Beginning of the keys that gguf_rotary.py reads."""

PLACES = {
    "vocab_size": ("vocab_size",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "context_length": ("max_position_embeddings",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.key_length_swa": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_shared_count": ("n_shared_experts",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "shortconv.l_cache": ("conv_L_cache",),
}
"""Where a config has what a key says, the first name that the config knows."""

SETS_NOTHING = {
    "pooling_type", "classifier.output_labels", "tensor_data_layout", "decoder_start_token_id", "context_length",
}  # fmt: skip
"""Keys that change no prediction where the config has no place for them."""

ONE_IS_NOTHING = {
    "logit_scale", "residual_scale", "embedding_scale", "attention.output_scale", "expert_weights_scale",
    "expert_group_count", "expert_group_used_count", "interleave_moe_layer_step", "rope.scaling.alpha",
}  # fmt: skip
"""Factors and counts that are as good as absent at 1; every other key is at 0 or false, but for the next."""

TRUE_IS_NOTHING = {"attention.causal"}

DIVIDED_BY_WIDTH = (46, 62)
"""Numbers of blocks at which llama.cpp scales attention by width / heads, else by the width of a head, where a config
has query_pre_attn_scalar: GGUF has no key for it (src/models/gemma2.cpp, gemma3.cpp: LLM_TYPE_27B)."""


@dataclass(frozen=True)
class Metadata:
    """architecture: its name in GGUF; values: its own keys without that name; tables: rotary factors by tensor name."""

    path: Path
    architecture: str
    values: dict[str, Any]
    tables: dict[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        return self.values.get(key, default)

    def refuse(self, key: str, why: str) -> InputError:
        """What to raise for a key that cannot be read."""
        value = str(self.values[key])[:60]
        return InputError(f"{self.path} says {self.architecture}.{key} = {value}, {why}: start from its safetensors")


def settle(config: Any, metadata: Metadata) -> None:
    """Give `config`, as transformers has read it, what the keys say; InputError where it has no place for one."""
    known = _Known(config, metadata.architecture)
    for key, value in metadata.values.items():
        if key.startswith(ROTARY) or known.taken(key):
            continue
        if key == "feed_forward_length" and not _any(value):  # its blocks have none
            continue
        if isinstance(value, list) and value and all(item == value[0] for item in value) and key in PLACES:
            value = value[0]
        name = known.place(key)
        if key == "attention.sliding_window_pattern" and known.has("layer_types"):
            config.layer_types = _layer_types(config, value, metadata)
        elif key == "attention.scale" and value and known.has("query_pre_attn_scalar"):
            config.query_pre_attn_scalar = round(value**-2)  # whole in every config
            if not math.isclose(config.query_pre_attn_scalar, value**-2, rel_tol=CLOSE):
                raise metadata.refuse(key, "which is one by the root of no whole number")
        elif name is not None:
            setattr(config, name, None if key == "attention.sliding_window" and not value else value)
        elif not (key in SETS_NOTHING or changes_nothing(key, value) or _implied(config, key, value)):
            raise metadata.refuse(key, f"which a {config.model_type} of transformers has no place for")
    if known.has("query_pre_attn_scalar") and not metadata.get("attention.scale"):
        wide = config.num_hidden_layers in DIVIDED_BY_WIDTH
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if wide else head_width(config)
    if "attention.sliding_window" not in metadata.values:
        _slide_nowhere(config)


def changes_nothing(key: str, value: Any) -> bool:
    """Whether a key has the value that it has where it is absent."""
    if key in TRUE_IS_NOTHING:
        return bool(value)
    return not _any(value) or (key in ONE_IS_NOTHING and value == 1)


def head_width(config: Any) -> int:
    """Channels of an attention head; 0 where there are none."""
    heads = getattr(config, "num_attention_heads", None)
    return int(getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))


def rotates_by_kind(config: Any) -> bool:
    """Whether full and sliding layers have rotary parameters of their own."""
    found = getattr(config, "rope_parameters", None)
    return isinstance(found, dict) and "sliding_attention" in found


def _slide_nowhere(config: Any) -> None:
    """Without a window in the file no layer has one, but where some do by their kind and all rotate alike.

    There llama.cpp has the window that the config has by itself (src/models/gemma2.cpp).
    """
    if rotates_by_kind(config):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    elif "sliding_attention" not in (getattr(config, "layer_types", None) or []) and hasattr(config, "sliding_window"):
        config.sliding_window = None


class _Known:
    """What a config of this class understands, and what transformers' reader has put into it."""

    def __init__(self, config: Any, architecture: str) -> None:
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        self._plain = type(config)()
        names = [
            architecture,
            architecture.replace("-", "_"),
            config.model_type,
            config.model_type.removesuffix("_text"),
        ]
        self._mapping: dict[str, Any] = next((GGUF_CONFIG_MAPPING[n] for n in names if n in GGUF_CONFIG_MAPPING), {})

    def has(self, name: str) -> bool:
        """Whether it is an attribute of the config, not one that is carried along."""
        return hasattr(self._plain, name)

    def taken(self, key: str) -> bool:
        """Whether transformers' reader has put the key where the model looks for it."""
        name = self._mapping.get(key)
        return isinstance(name, str) and self.has(name)

    def place(self, key: str) -> str | None:
        """The attribute that has what the key says."""
        return next((name for name in PLACES.get(key, ()) if self.has(name)), None)


def _implied(config: Any, key: str, value: Any) -> bool:
    """Whether a key without a place says what the config says anyway."""
    width, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 0)
    found = {
        "attention.head_count_kv": heads,
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        "attention.value_length_swa": head_width(config),
        "attention.scale": head_width(config) ** -0.5 if heads else None,
        "feed_forward_length": 4 * width,
        "embedding_length_out": width,
        "expert_feed_forward_length": getattr(config, "intermediate_size", None),
        "expert_gating_func": GATES.get(str(getattr(config, "scoring_func", "softmax"))),
    }.get(key)
    numbers = isinstance(found, int | float) and isinstance(value, int | float)
    return numbers and math.isclose(value, found, rel_tol=CLOSE)  # type: ignore[arg-type]


GATES = {"softmax": 1, "sigmoid": 2}
"""Values of expert_gating_func."""


def _layer_types(config: Any, pattern: Any, metadata: Metadata) -> list[str]:
    """Sliding layers: those marked by a list, or all but every n-th."""
    count = config.num_hidden_layers
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        sliding = [pattern == 0 or index % pattern < pattern - 1 for index in range(count)]
    elif isinstance(pattern, list) and len(pattern) == count:
        sliding = [bool(item) for item in pattern]
    else:
        raise metadata.refuse("attention.sliding_window_pattern", f"which is no pattern of {count} blocks")
    return ["sliding_attention" if item else "full_attention" for item in sliding]


def _any(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)
