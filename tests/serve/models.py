"""Tiny models that vLLM can run, and what is made of them; written by transformers and lrcompress alone."""

from pathlib import Path
from typing import Any

import torch

# vLLM splits embeddings evenly: 384 rows go into two and three processes.
SIZES = {"vocab_size": 384, "hidden_size": 192, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": None,
         "pad_token_id": 1, "tie_word_embeddings": False}  # fmt: skip

PROMPTS = ["The", "for i in", "A module", "class", "If the value", "Objects are"]


def config(architecture: str) -> Any:
    """A config of `architecture`; queries share one head of keys, which every process of several gets."""
    from transformers import Gemma3TextConfig, LlamaConfig, MixtralConfig, Qwen3Config

    kinds = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig, "mixtral": MixtralConfig}
    more = {"gemma3": {"sliding_window": 64}, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}
    return kinds[architecture](**{**SIZES, **more.get(architecture, {})})


def tokenizer() -> Any:
    """A byte-level BPE of 320 pieces, learnt from what every Python carries, with a chat template."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["\n\n".join(topics[key] for key in sorted(topics))[:100_000]], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="<pad>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return made


def make_dense(architecture: str, folder: Path) -> Path:
    """A random model in float32 whose layers matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


RECIPES: dict[str, dict[str, Any]] = {
    "low_rank": {"method": {"name": "lord", "metric": "centred"}, "format": "low_rank", "ratio": 0.3},
    "pivoted": {"method": {"name": "lord", "metric": "centred"}, "format": "pivoted", "ratio": 0.2},
    "joined": {"method": {"name": "welore", "join": "auto"}, "ratio": 0.4},
    "mixed": {"method": "welore", "ratio": 0.15},
    "coded": {"method": "ecsq", "ratio": None, "bpw": 4},
    "quantized": {"method": {"name": "eora", "metric": "centred"}, "base": "rtn:4:32", "ratio": None, "rank": 0},
    "sum": {"method": {"name": "eora", "metric": "centred"}, "base": "rtn:3:32", "ratio": None, "rank": 6},
    "sum_of_codes": {"method": {"name": "eora", "factor_bits": 8}, "base": "rtn:3:24", "ratio": None, "rank": 6},
    "semi_sparse": {"method": "eora", "base": "magnitude:2:4", "ratio": None, "rank": 0},
    "sparse_sum": {"method": {"name": "eora", "factor_bits": 4}, "base": "wanda:2:4", "ratio": None, "rank": 6},
    "dictionary": {"method": "cospadi", "ratio": 0.3},
    "input_dictionary": {"method": {"name": "cospadi", "side": "input"}, "ratio": 0.3},
}
"""What is made of the Llama: every format, with biases that compression added, shards of several formats, and dense ones."""


def compress(dense: Path, output: Path, recipe: dict[str, Any]) -> Path:
    """A checkpoint by a recipe; experts stay as they are."""
    from lrcompress.pipeline import compress
    from lrcompress.recipe import make_recipe

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
