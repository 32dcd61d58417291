"""How much a run multiplies and moves: what bounds the gain of a compressed model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrcompress.formats import StoredLinear
from lrcompress.formats.base import held
from lrcompress.model.targets import is_conv1d


@dataclass
class Work:
    """Of the linear layers that ran, the output head among them; attention's own products and norms are left out."""

    multiply_adds: int = 0
    weight_bytes: int = 0


def counted(model: nn.Module, run: Callable[[], Any]) -> tuple[Work, Any]:
    """The work of `run()`, which calls the model, by the rows that every layer really gets; and what it returns."""
    work, hooks = Work(), []

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = x.numel() // x.shape[-1]
        if isinstance(layer, StoredLinear):
            work.multiply_adds += rows * layer.multiply_adds(rows)
            work.weight_bytes += layer.touched_bytes(rows)
        else:
            work.multiply_adds += rows * layer.weight.numel()  # type: ignore[operator,union-attr]
            work.weight_bytes += held(*layer.parameters(recurse=False))

    try:
        for layer in _linear_layers(model):
            hooks.append(layer.register_forward_pre_hook(count, with_kwargs=True))
        result = run()
    finally:
        for hook in hooks:
            hook.remove()
    return work, result


def _linear_layers(module: nn.Module) -> list[nn.Module]:
    """The outermost: not the factors that a stored format holds."""
    if isinstance(module, StoredLinear | nn.Linear) or is_conv1d(module):
        return [module]
    return [layer for child in module.children() for layer in _linear_layers(child)]
