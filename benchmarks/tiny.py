"""A tiny random config of any model type that transformers knows, made from the default one by what its entries mean.

Widths, counts and vocabularies shrink alike, by their names; entries that must fit together in one type only stand in
EXCEPTIONS.
"""

from typing import Any

VOCABULARY = 544
"""More than the tokenizer makes, so that those that stand for images are no text."""

TEXT: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embedding_size", "emb_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size"), 96),
    **dict.fromkeys(("ffn_hidden_size", "ffn_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"), 4),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "attention_head_dim", "global_head_dim", "d_kv", "index_head_dim"), 16),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("swa_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 12),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("index_n_heads", "index_topk", "o_groups", "n_groups", "mamba_n_groups"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 256),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "n_ctx"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "word_embed_proj_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    "qk_head_dim": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_kv_shared_layers": 0,
    "lru_width": 64, "mrope_section": [2, 3, 3], "first_k_dense_replace": 1, "word_embed_proj_dim": 64,
    "num_global_key_value_heads": 2, "altup_num_inputs": 2, "laurel_rank": 8, "moe_layer_start_index": 1,
    "chunk_size": 16, "mamba_chunk_size": 16, "type_vocab_size": 2, "enc_to_dec_proj_dim": 64,
}  # fmt: skip
"""Entries of a language model's config, whatever type it is of, with their tiny values."""

TOWER: dict[str, Any] = {
    **TEXT,
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "dim", "width", "encoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "mlp_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads", "heads"), 2),
    **dict.fromkeys(("out_hidden_size", "output_dim", "projection_dim", "proj_dim"), 64),
    **dict.fromkeys(("image_size", "input_size"), 32),
    **dict.fromkeys(("patch_size", "window_size"), 8),
    "head_dim": 16, "num_position_embeddings": 16, "num_channels": 3, "vocab_size": VOCABULARY,
    "deepstack_visual_indexes": [0, 1], "fullatt_block_indexes": [1], "global_attn_indexes": [1],
    "num_mel_bins": 16, "max_source_positions": 64, "mlp_ratio": 1.5,
}  # fmt: skip
"""The same for what sees or hears."""

TOWERS = ("vision", "audio", "image", "qformer", "encoder", "vq", "vit", "projector", "speech", "perceiver", "codec")
"""Parts of the names of sub-configs that are towers."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note_text": {
        "per_layer_config": {
            place: {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
            | {"head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 16, "qk_rope_head_dim": 8}
            for place in ("2", "3")
        }
    },
    "dots1": {"layer_types": None, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma3n_text": {
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": 0},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"num_hidden_layers": 8, "attn_layer_period": 3, "attn_layer_offset": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"], "num_hidden_layers": 6},
}
"""By model type, what the tables get wrong: entries of its own config."""


def tiny_config(cls: type[Any], *, tower: bool = False, sees: bool = False) -> Any:
    """A config of class `cls` whose model has some hundred thousand numbers.

    `tower`: it is that of what sees or hears, `sees`: of a language model beside such a tower.
    """
    default = cls()
    known = default.to_dict()
    sizes = TOWER if tower else TEXT
    names = {**{key: key for key in known}, **{key: alias for key, alias in default.attribute_map.items()}}
    small = {names[key]: _like(known.get(names[key]), value) for key, value in sizes.items() if key in names}
    small |= _special_tokens(known)
    for key in getattr(cls, "sub_configs", {}):
        own = _sub_class(cls, default, key)
        if own is not None:
            within = tower or any(part in key for part in TOWERS)
            small[key] = tiny_config(own, tower=within, sees="vision_config" in cls.sub_configs).to_dict()
    heads = known.get(names.get("num_attention_heads", ""))
    for key in {
        "num_key_value_heads",
        "num_kv_heads",
    } & small.keys():  # as many as heads, or one, where the default has
        small[key] = (
            small[names["num_attention_heads"]] if known[key] == heads else 1 if known[key] == 1 else small[key]
        )
    if {"qk_rope_head_dim", "head_dim"} <= small.keys():
        small["head_dim"] = small["qk_rope_head_dim"]
    rope = known.get("rope_parameters")
    if isinstance(rope, dict) and (sees or "mrope_section" in rope) and "rope_type" in rope and not tower:
        pairs = int(8 * rope.get("partial_rotary_factor", 1))
        small["rope_parameters"] = {**rope, "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]}
    return cls(**{**small, **EXCEPTIONS.get(cls.model_type, {})})


def _like(default: Any, value: Any) -> Any:
    """The value in the form that the default has: a list of it where that is one, no fraction where that is whole."""
    if isinstance(default, (list, tuple)) and isinstance(value, int):
        return [value] * len(default)
    return int(value) if isinstance(default, int) and isinstance(value, float) else value


def _special_tokens(known: dict[str, Any]) -> dict[str, int]:
    """Numbers within the vocabulary for the tokens that stand for images and the like."""
    common = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = [
        key
        for key, value in known.items()
        if (key.endswith(("_token_id", "_token_index")) or key == "image_token") and isinstance(value, int)
    ]
    return {key: VOCABULARY - 1 - place for place, key in enumerate(key for key in found if key not in common)}


def _sub_class(cls: type[Any], default: Any, key: str) -> type[Any] | None:
    """The class of a sub-config: that of the default's, or the declared one where the default has none."""
    from transformers import AutoConfig

    own = getattr(default, key, None)
    if own is not None and not isinstance(own, dict):
        return type(own)
    declared: type[Any] = cls.sub_configs[key]
    return None if declared is AutoConfig else declared
