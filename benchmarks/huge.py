"""What `plan` takes of a model of 660 billion numbers: seconds of the processor and peak memory.

    python benchmarks/huge.py --folder /tmp/huge
    python benchmarks/huge.py --folder /tmp/huge --small                   # does it run?

The shapes are DeepSeek-V3's with 60 blocks. The files have true headers and holes behind them, so that they take a few MB of the disk.
Every command is a process of its own.
"""

import argparse
import json
import math
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

SIZES = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 60,
    "n_routed_experts": 256, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
    "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
}  # fmt: skip
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 4,
    "n_routed_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 12,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "vocab_size": 320, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
COMMANDS = [
    ["plan", "--method", "lord", "--allocator", "uniform", "--ratio", "0.2"],
    ["plan"],
    ["inspect"],
]


def block(sizes: dict[str, int], index: int, dense: int) -> Iterator[tuple[str, list[int]]]:
    """Name in the published files and shape of every tensor of a block; the first `dense` ones have no experts."""
    hidden, heads, stem = sizes["hidden_size"], sizes["num_attention_heads"], f"model.layers.{index}."
    nope, rope, value = sizes["qk_nope_head_dim"], sizes["qk_rope_head_dim"], sizes["v_head_dim"]
    queries, keys = sizes["q_lora_rank"], sizes["kv_lora_rank"]
    attention = {
        "q_a_proj": [queries, hidden], "q_a_layernorm": [queries], "q_b_proj": [heads * (nope + rope), queries],
        "kv_a_proj_with_mqa": [keys + rope, hidden], "kv_a_layernorm": [keys],
        "kv_b_proj": [heads * (nope + value), keys], "o_proj": [hidden, heads * value],
    }  # fmt: skip
    yield from ((f"{stem}self_attn.{name}.weight", shape) for name, shape in attention.items())
    yield from ((f"{stem}{name}.weight", [hidden]) for name in ("input_layernorm", "post_attention_layernorm"))
    inner, parts = sizes["intermediate_size"], [""]
    if index >= dense:
        count = sizes["n_routed_experts"]
        yield from ((f"{stem}mlp.gate.weight", [count, hidden]), (f"{stem}mlp.gate.e_score_correction_bias", [count]))
        inner, parts = sizes["moe_intermediate_size"], [*(f"experts.{i}." for i in range(count)), "shared_experts."]
    for part in parts:
        for name, shape in (("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])):
            yield f"{stem}mlp.{part}{name}_proj.weight", shape


def write(folder: Path, sizes: dict[str, int]) -> int:
    """A checkpoint of such sizes, a file a block; how many numbers it has."""
    dense = 3 if sizes["num_hidden_layers"] > 4 else 1
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": dense,
              "n_shared_experts": 1, "tie_word_embeddings": False, "dtype": "bfloat16", **sizes}  # fmt: skip
    vocabulary, hidden, blocks = sizes["vocab_size"], sizes["hidden_size"], sizes["num_hidden_layers"]
    ends = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden],
            "lm_head.weight": [vocabulary, hidden]}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    index, numbers = {}, 0
    for place, part in enumerate([ends, *(dict(block(sizes, i, dense)) for i in range(blocks))]):
        name, header, end = f"model-{place + 1:05d}-of-{blocks + 1:05d}.safetensors", {}, 0
        for key, shape in part.items():
            start, end = end, end + 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            index[key] = name
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + end)
        numbers += end // 2
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2 * numbers}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(config))
    return numbers


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds of the processor and peak resident MB of a process; SystemExit where it fails."""
    process = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Write the checkpoint and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    numbers = write(args.folder, SMALL if args.small else SIZES)
    print(f"{numbers / 1e9:.4g} billion numbers")
    for name, *options in COMMANDS:
        seconds, memory = measured([sys.executable, "-m", "lrcompress", name, str(args.folder), *options, "--quiet"])
        print(f"{' '.join([name, *options])}: {seconds:.1f} s of the processor, {memory:.0f} MB at most", flush=True)


if __name__ == "__main__":
    main()
