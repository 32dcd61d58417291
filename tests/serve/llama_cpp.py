"""The model card's commands for llama.cpp, run as they stand: llama_cpp.py FOLDER prints RESULT and what was found."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.export.converter import NAMES, rotated
from tests.serve.models import SIZES, contexts, log_probabilities, nearness


def blocks(card: str, kind: str) -> list[str]:
    """The code of a card's section about serving, fenced as `kind`."""
    return re.findall(rf"^```{kind}\n(.*?)^```", card.partition("## Serve")[2], flags=re.M | re.S)


def likeliest(answer: dict[str, Any]) -> dict[int, float]:
    """Token to log-probability, of the first token of an answer."""
    return {top["id"]: top["logprob"] for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def exact(folder: Path, gguf: Path) -> int:
    """How many weights of the file are those of the checkpoint (its base's), number for number, by gguf's own code."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoModelForCausalLM

    from lrcompress.formats.sum import Sum
    from lrcompress.model.surgery import dense_parts, stored_layers

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    same = 0
    for name, layer in stored_layers(model).items():
        _, _, block, kind = name.split(".", 3)
        tensor = tensors[f"blk.{block}.{NAMES[kind]}.weight"]
        weight = (layer.base.dense() if isinstance(layer, Sum) else dense_parts(layer)[0]).detach()
        heads = {"attn_q": SIZES["num_attention_heads"], "attn_k": SIZES["num_key_value_heads"]}.get(NAMES[kind])
        found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        same += torch.equal(found, weight if heads is None else rotated(weight, heads))
    return same


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    card = (folder / "README.md").read_text()
    wanted = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for command in blocks(card, ""):
            if command.startswith("lrcompress"):
                subprocess.run(command.replace("path/of/this/folder", str(folder)).split(), check=True)
        space: dict[str, Any] = {}
        exec(blocks(card, "python")[0], space)  # what a user would paste
        assert space["answer"]["choices"][0]["text"]
        texts = contexts(wanted["ids"], wanted["tokens"])
        server = space["xllamacpp"].Server(space["params"])
        found = [
            likeliest(server.handle_completions({"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 20}))
            for ids in texts
        ]
        right, said = nearness(found, log_probabilities(folder, texts))
        same = exact(folder, Path("model.gguf"))
    integers = folder.name in ("quantized", "sum")
    print(f"RESULT {said}" + (f", {same} weights exact" if same else ""), flush=True)
    os._exit(0 if right and (same > 0 or not integers) else 1)  # two servers in a process need not end in order


if __name__ == "__main__":
    main()
