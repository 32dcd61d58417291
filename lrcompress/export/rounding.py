"""What it costs to store a checkpoint's weights anew, measured on text, and which layers read the same input."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.calibration.corpus import parse_source
from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.evaluation.loading import LoadedModel
from lrcompress.evaluation.tokens import token_perplexity
from lrcompress.formats import StoredLinear
from lrcompress.model.surgery import densify

WINDOWS, LENGTH = 8, 256
"""Of python-docs, which is always there."""


def perplexity_rise(
    loaded: LoadedModel, names: Iterable[str], weight: Callable[[str], Tensor], *, trust_remote_code: bool
) -> float:
    """How much the perplexity of the model rises, relative to what it is, with weight(name) (out, in) in its layers.

    The model is densified.
    """
    source = parse_source("python-docs")
    blocks = calibration_blocks(
        [(source, WINDOWS, LENGTH)], loaded.tokenizer, 0, loaded.folder, trust_remote_code=trust_remote_code
    ).ids
    before = token_perplexity(loaded.model, blocks, lambda: None)["token_perplexity"]
    layers = {name: loaded.model.get_submodule(name) for name in names}
    turned = {name for name, layer in layers.items() if isinstance(layer, StoredLinear) and layer.spec.conv1d}
    densify(loaded.model)
    with torch.no_grad():
        for name in layers:
            parameter: Any = loaded.model.get_submodule(name).weight
            found = weight(name)
            parameter.copy_(found.T if name in turned else found)
    return float(token_perplexity(loaded.model, blocks, lambda: None)["token_perplexity"] / before - 1)


@torch.no_grad()
def read_together(model: nn.Module) -> list[list[str]]:
    """Linear layers of one module that read the same input, as q, k and v do: what servers run as one layer."""
    seen: dict[tuple[int, str], tuple[Tensor, list[str]]] = {}

    def note(name: str, args: tuple[Any, ...]) -> None:
        if args and torch.is_tensor(args[0]):
            # The tensor is kept, so that no later one has its identity.
            seen.setdefault((id(args[0]), name.rpartition(".")[0]), (args[0], []))[1].append(name)

    inner = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, StoredLinear)
        for part, _ in module.named_modules()
        if part
    }
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, StoredLinear)) and name not in inner
    ]
    try:
        model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [names for _, names in seen.values() if len(names) > 1]
