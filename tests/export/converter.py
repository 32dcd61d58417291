"""A stand-in for llama.cpp's converter, for tiny llamas: its names, and the order in which it wants rotated rows."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head in pairs, not in halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile")
    parser.add_argument("--outtype")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    writer = GGUFWriter(args.outfile, "llama")
    writer.add_name(args.model.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_token_list(["<s>", "</s>", "ä"])
    writer.add_file_type(1)
    for name, tensor in load_file(args.model / "model.safetensors").items():
        tensor = tensor.float()
        if name.startswith("model.layers."):
            _, _, block, *kind, _ = name.split(".")
            kind = ".".join(kind)
            if kind[-6:] in ("q_proj", "k_proj"):
                count = "num_attention_heads" if kind.endswith("q_proj") else "num_key_value_heads"
                tensor = rotated(tensor, config[count])
            name = f"blk.{block}.{NAMES[kind]}.weight"
        name = OUTSIDE.get(name, name.replace("lm_head", "output"))
        if tensor.dim() > 1 and args.outtype == "bf16":
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(name, quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
