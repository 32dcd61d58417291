"""Tiny models that vLLM and llama.cpp can run, and what is made of them; written by transformers and lrcompress alone."""

import string
from pathlib import Path
from typing import Any

import torch

# vLLM splits embeddings evenly: 384 rows go into two and three processes.
SIZES = {"vocab_size": 384, "hidden_size": 192, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": None,
         "pad_token_id": 1, "tie_word_embeddings": False}  # fmt: skip

PROMPTS = ["The", "for i in", "A module", "class", "If the value", "Objects are"]

NEAR = 0.1
"""Of log-probabilities computed in 16 bits or from rounded weights."""

PAIRS = "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le".split()
"""Pieces of two letters, which with bytes and characters make 384."""


BYTES = slice(3, 3 + 256)
"""Of the vocabulary."""


def config(architecture: str) -> Any:
    """A config of `architecture`; queries share one head of keys, which every process of several gets."""
    from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=SIZES["vocab_size"], n_embd=96, n_layer=2, n_head=3, n_positions=256, bos_token_id=0
        )
    kinds = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig, "mixtral": MixtralConfig,
             "qwen3_moe": Qwen3MoeConfig}  # fmt: skip
    more = {
        "gemma3": {"sliding_window": 64},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True},
    }
    return kinds[architecture](**{**SIZES, **more.get(architecture, {})})


def tokenizer() -> Any:
    """Characters, bytes and a few pairs, in the layout of Llama's tokenizers, which llama.cpp's converter reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*string.ascii_letters, *string.digits, *string.punctuation, "▁"]
    pieces = ["<s>", "<pad>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *PAIRS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    raw = Tokenizer(models.BPE(vocab, [(a, b) for a, b in PAIRS], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return made


def make_dense(architecture: str, folder: Path) -> Path:
    """A random model in float32 whose layers matter; no likeliest token is a byte, parts of characters have no text."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        model.get_output_embeddings().weight[BYTES] = 0
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


RECIPES: dict[str, dict[str, Any]] = {
    "low_rank": {"method": {"name": "lord", "metric": "centred"}, "format": "low_rank", "ratio": 0.3},
    "pivoted": {"method": {"name": "lord", "metric": "centred"}, "format": "pivoted", "ratio": 0.2},
    "joined": {"method": {"name": "welore", "join": "auto"}, "ratio": 0.4},
    "mixed": {"method": "welore", "ratio": 0.15},
    "some_dense": {
        "method": {"name": "lord", "metric": "centred"},
        "ratio": 0.2,
        "ignore": ["*.k_proj", "*.1.*up_proj"],
    },
    "coded": {"method": "ecsq", "ratio": None, "bpw": 4},
    "quantized": {"method": {"name": "eora", "metric": "centred"}, "base": "rtn:4:32", "ratio": None, "rank": 0},
    "sum": {"method": {"name": "eora", "metric": "centred"}, "base": "rtn:3:32", "ratio": None, "rank": 6},
    "sum_of_codes": {"method": {"name": "eora", "factor_bits": 8}, "base": "rtn:3:24", "ratio": None, "rank": 6},
    "semi_sparse": {"method": "eora", "base": "magnitude:2:4", "ratio": None, "rank": 0},
    "sparse_sum": {"method": {"name": "eora", "factor_bits": 4}, "base": "wanda:2:4", "ratio": None, "rank": 6},
    "sparse_dictionary": {"method": "cospadi", "ratio": 0.3},
    "transposed_dictionary": {"method": {"name": "cospadi", "side": "input"}, "ratio": 0.3},
}
"""Every format, with biases that compression added, shards of several formats, and dense ones; experts stay as they are."""

EXPERTS: dict[str, dict[str, Any]] = {
    "experts_low_rank": {"method": {"name": "lord", "metric": "input"}, "format": "low_rank", "ratio": 0.3},
    "experts_coded": {"method": "ecsq", "ratio": None, "bpw": 4},
    "experts_sum": {"method": {"name": "eora", "metric": "input"}, "base": "rtn:3:32", "ratio": None, "rank": 6},
    "experts_some": {
        "method": {"name": "lord", "metric": "input"},
        "ratio": 0.3,
        "ignore": ["*experts.2.*", "*.0.mlp*"],
    },
    "experts_biased": {"method": {"name": "lord", "metric": "centred"}, "format": "low_rank", "ratio": 0.3},
}
"""What is made of the experts of a mixture, with all else."""

REFUSED = {
    ("llama", "embeddings"): {"method": "ecsq", "ratio": None, "bpw": 6, "target": ["model.embed_tokens", "*_proj"]},
    ("gpt2", "transposed"): {"method": "lord", "ratio": 0.3},
}
"""What vLLM cannot load: tables of embeddings, transposed layers."""


def compress(dense: Path, output: Path, name: str) -> Path:
    """A checkpoint by a recipe of that name."""
    from lrcompress.pipeline import compress
    from lrcompress.recipe import make_recipe

    others = {**EXPERTS, **{name: recipe for (_, name), recipe in REFUSED.items()}}
    recipe = others[name] if name in others else RECIPES[name]
    if name in RECIPES and dense.parent.name == "mixtral":
        recipe = {**recipe, "ignore": [*recipe.get("ignore", []), "*experts*"]}
    data = {
        "model": str(dense),
        "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64},
        "output": str(output),
    }
    compress(make_recipe({**data, **recipe}))
    return output


def greedy(folder: Path, ids: list[list[int]], count: int) -> list[list[int]]:
    """transformers' greedy tokens, in float32."""
    from transformers import AutoModelForCausalLM

    import lrcompress  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in ids:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(count):
                tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def log_probabilities(folder: Path, contexts: list[list[int]]) -> torch.Tensor:
    """transformers' of the token after each context, (contexts, vocabulary), in float32."""
    from transformers import AutoModelForCausalLM

    import lrcompress  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in contexts])


def contexts(ids: list[list[int]], tokens: list[list[int]]) -> list[list[int]]:
    """Every prompt, and it with the first tokens of its continuation."""
    return [prompt + after[:count] for prompt, after in zip(ids, tokens, strict=True) for count in (0, 1, 3, 6)]


def nearness(found: list[dict[int, float]], wanted: torch.Tensor) -> tuple[bool, str]:
    """Whether the likeliest tokens of a runtime (id to log-probability) are nearly ours: rounding may part those that
    are as likely as each other, and moves no log-probability far."""
    first, apart = 0, []
    for likeliest, ours in zip(found, wanted, strict=True):
        best = max(likeliest, key=lambda token: likeliest[token])
        first += float(ours.max() - ours[best]) < NEAR
        apart += [abs(value - float(ours[token])) for token, value in likeliest.items()]
    mean = sum(apart) / len(apart)
    return first == len(found) and mean < NEAR, f"{first} of {len(found)} first tokens, {mean:.3f} apart"
