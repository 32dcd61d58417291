"""A tiny config of every architecture that the tests build."""

from typing import Any

VOCABULARY = 320


def configs() -> dict[str, Any]:
    """Architecture to config; three blocks, or two where experts make a block large."""
    import transformers as t

    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, **common}
    grouped = {**sizes, "num_key_value_heads": 2, "max_position_embeddings": 256}
    moe = {**grouped, "num_hidden_layers": 2, "tie_word_embeddings": False, "head_dim": 8}
    qwen_moe = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    made = {
        "llama": t.LlamaConfig(tie_word_embeddings=False, **grouped),
        "olmo": t.OlmoConfig(**grouped),
        "rwkv": t.RwkvConfig(**{**sizes, "attention_hidden_size": 32}, context_length=256),
        "mistral": t.MistralConfig(sliding_window=16, **grouped),
        "qwen2": t.Qwen2Config(**grouped),
        "qwen3": t.Qwen3Config(
            num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **sizes
        ),
        "gemma2": t.Gemma2Config(head_dim=8, sliding_window=16, layer_types=layers, **grouped),
        "gemma3": t.Gemma3TextConfig(
            num_key_value_heads=2, head_dim=8, sliding_window=16, layer_types=layers, **sizes
        ),
        "phi3": t.Phi3Config(**grouped),
        "olmo2": t.Olmo2Config(**grouped),
        "gpt2": t.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, **common),
        "gpt_neox": t.GPTNeoXConfig(max_position_embeddings=256, **sizes),
        "opt": t.OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
            max_position_embeddings=256, **common,
        ),
        "falcon": t.FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **common),
        "bloom": t.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **common),
        "mpt": t.MptConfig(d_model=32, n_layers=3, n_heads=4, max_seq_len=256, **common),
        "cohere": t.CohereConfig(**grouped),
        "stablelm": t.StableLmConfig(**grouped),
        "gpt_bigcode": t.GPTBigCodeConfig(n_embd=32, n_layer=3, n_head=4, n_positions=256, **common),
        "mamba": t.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=3, time_step_rank=4, **common),
        "deepseek_v3": t.DeepseekV3Config(
            **{**moe, "head_dim": 4, "num_key_value_heads": 4}, moe_intermediate_size=24, n_routed_experts=8,
            num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=12,
            kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        ),
        "mixtral": t.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **moe),
        "qwen3_moe": t.Qwen3MoeConfig(**qwen_moe, **moe),
        "gpt_oss": t.GptOssConfig(
            num_local_experts=4, num_experts_per_tok=2, sliding_window=16, layer_types=layers[:2], **moe
        ),
        "jamba": t.JambaConfig(  # blocks of two classes, attention first
            mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=0, expert_layer_period=2,
            expert_layer_offset=1, num_experts=4, **{**moe, "num_hidden_layers": 3},
        ),
        "recurrent_gemma": t.RecurrentGemmaConfig(
            lru_width=32, attention_window_size=16, num_key_value_heads=1, head_dim=8, **sizes
        ),
        "gemma4": t.Gemma4TextConfig(
            hidden_size_per_layer_input=0, num_kv_shared_layers=0, head_dim=8, global_head_dim=16,
            num_global_key_value_heads=2, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24,
            sliding_window=16, layer_types=layers, **grouped,
        ),
        "gemma4_small": t.Gemma4TextConfig(  # an embedding of every token for every block; the last two share keys
            hidden_size_per_layer_input=8, num_kv_shared_layers=2, head_dim=8, global_head_dim=16, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=VOCABULARY,
            **{**grouped, "num_hidden_layers": 4},
        ),
        "glm_dsa": t.GlmMoeDsaConfig(  # a block without an indexer reads the tokens that the one before has chosen
            **{**moe, "head_dim": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}, moe_intermediate_size=24,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1, q_lora_rank=12,
            kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, index_topk=8, index_head_dim=8,
            index_n_heads=2, indexer_types=["full", "shared", "full"],
        ),
        "deepseek_v4": t.DeepseekV4Config(  # four streams of hidden states; experts chosen by the token itself
            **{**moe, "num_key_value_heads": 1}, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
            q_lora_rank=12, o_lora_rank=12, o_groups=2, qk_rope_head_dim=4, index_topk=8, index_head_dim=8,
            index_n_heads=2,
        ),
        "olmo_hybrid": t.OlmoHybridConfig(  # a convolution is three tensors in its files
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            **{**grouped, "num_key_value_heads": 4},
        ),
        "zamba2": t.Zamba2Config(  # its attention is one, called after several blocks
            **{**sizes, "num_hidden_layers": 4}, layers_block_type=["mamba", "hybrid", "hybrid", "mamba"], chunk_size=16,
            mamba_d_state=4, mamba_headdim=8,
        ),
    }  # fmt: skip
    if "sarvam_moe" in t.CONFIG_MAPPING:
        made["sarvam_moe"] = t.AutoConfig.for_model(  # queries, keys and values are one tensor in its files
            "sarvam_moe", moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            n_shared_experts=1, first_k_dense_replace=1, **moe,
        )  # fmt: skip
    return made


NEWER = ["sarvam_moe"]
"""What transformers 5.16, the oldest that lrcompress runs with, does not know."""

CARRYING = ["gemma4_small", "glm_dsa", "deepseek_v4"]
"""Those whose blocks read more than the hidden states of the block before."""

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt2", "gpt_neox", "opt", "falcon",
    "bloom", "mpt", "cohere", "stablelm", "gpt_bigcode", "mamba", "deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss",
    "jamba", "recurrent_gemma", "gemma4",
]  # fmt: skip

ALL_CODES = ["olmo", "rwkv"]
"""Those that once could not be loaded or walked with all of their layers coded: blocks without a parameter of their own,
and layers that a model fills by the sides of their weights."""

MIXTURES = ["deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss"]
"""Those whose experts are fused."""


def wrappers() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Kind to the tiny config of a model that reads images beside text, and what it reads one image by.

    16 patches each; the image's tokens are 300.
    """
    import torch
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    seen = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    llava = t.LlavaConfig(
        text_config=t.LlamaConfig(**text, **ends), image_token_index=300, vision_feature_layer=-1,
        vision_config=t.CLIPVisionConfig(image_size=32, patch_size=8, **vision),
    )  # fmt: skip
    qwen = t.Qwen3VLConfig(
        text_config={
            **text, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303,
    )  # fmt: skip
    patches = torch.randn(64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 8, 8]])
    intern = t.InternVLConfig(
        text_config=t.Qwen2Config(**text, **ends), image_token_id=300, downsample_ratio=0.5,
        vision_config=t.InternVLVisionConfig(image_size=[32, 32], patch_size=[4, 4], **vision),
    )  # fmt: skip
    smol = t.SmolVLMConfig(
        text_config=t.LlamaConfig(**text, **ends), image_token_id=300, scale_factor=2, pad_token_id=1,
        vision_config=t.SmolVLMVisionConfig(image_size=32, patch_size=4, **vision),
    )  # fmt: skip
    gemma = t.Gemma4Config(  # an embedding of every token for every block; image tokens see each other
        text_config=t.Gemma4TextConfig(
            hidden_size_per_layer_input=8, num_kv_shared_layers=0, head_dim=8, global_head_dim=16, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=VOCABULARY,
            use_bidirectional_attention="vision", **text, **ends,
        ),
        vision_config=t.Gemma4VisionConfig(
            num_key_value_heads=2, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=64, **vision,
        ),
        image_token_id=300, video_token_id=301, audio_token_id=302, boi_token_id=303, eoi_token_id=304,
        boa_token_id=305, eoa_token_index=306,
    )  # fmt: skip
    squares = torch.rand(1, 64, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), dim=-1).reshape(1, 64, 2)
    return {
        "llava": (llava, {"pixel_values": seen}),
        "qwen3_vl": (qwen, {"pixel_values": patches, "image_grid_thw": grid}),
        "internvl": (intern, {"pixel_values": seen}),
        "smolvlm": (smol, {"pixel_values": seen[:, None]}),
        "gemma4": (gemma, {"pixel_values": squares, "image_position_ids": places}),
    }
