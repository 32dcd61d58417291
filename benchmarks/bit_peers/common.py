"""What the peers share: the dense model's linear layers, and the file that the judge reads."""

import torch
from safetensors.torch import save_file
from torch import nn


def linears(folder: str) -> tuple[nn.Module, dict[str, nn.Linear]]:
    """The model in float32 and the linear layers of its blocks by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, {n: m for n, m in model.named_modules() if type(m) is nn.Linear and ".layers." in f".{n}"}


def save(output: str, weights: dict[str, torch.Tensor], stored: int, version: str) -> None:
    """The weights' dense values, with the bytes that they are stored in and the package's version."""
    tensors = {f"{name}.weight": weight.float().contiguous() for name, weight in weights.items()}
    save_file(tensors, output, {"bytes": str(stored), "version": version})
