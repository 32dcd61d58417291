"""How much a run multiplies and moves: what bounds the gain of a compressed model."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lrcompress.formats import StoredLinear
from lrcompress.formats.base import held
from lrcompress.formats.table import TiedHead
from lrcompress.model.experts import is_fused
from lrcompress.model.targets import is_conv1d


@dataclass
class Work:
    """Of the linear layers that ran, the output head and the experts among them; what is left out: attention's own
    products, routers, norms. kernels: how many weights of which format were multiplied by what."""

    multiply_adds: int = 0
    weight_bytes: int = 0
    kernels: Counter[str] = field(default_factory=Counter)


def counted(model: nn.Module, run: Callable[[], Any]) -> tuple[Work, Any]:
    """The work of `run()`, which calls the model, by the rows that every layer really gets; and what it returns."""
    work, hooks = Work(), []

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = x.numel() // x.shape[-1]
        layer = layer.table if isinstance(layer, TiedHead) else layer
        if isinstance(layer, StoredLinear):
            work.multiply_adds += rows * layer.multiply_adds(rows)
            work.weight_bytes += layer.touched_bytes(rows)
            work.kernels[f"{layer.name}: {layer.kernel(rows)}"] += 1
        else:
            work.multiply_adds += rows * layer.weight.numel()  # type: ignore[operator,union-attr]
            work.weight_bytes += held(*layer.parameters(recurse=False))

    def count_fused(experts: nn.Module, args: tuple[Any, ...]) -> None:
        chosen, weights = args[1], [p for p in experts.parameters() if p.dim() == 3]
        work.multiply_adds += chosen.numel() * sum(weight[0].numel() for weight in weights)
        work.weight_bytes += len(chosen.unique()) * held(*(parameter[0] for parameter in experts.parameters()))

    try:
        for layer in _linear_layers(model):
            hooks.append(layer.register_forward_pre_hook(count, with_kwargs=True))
        for experts in filter(is_fused, model.modules()):
            hooks.append(experts.register_forward_pre_hook(count_fused))
        result = run()
    finally:
        for hook in hooks:
            hook.remove()
    return work, result


def _linear_layers(module: nn.Module) -> list[nn.Module]:
    """The outermost: not the factors that a stored format holds."""
    if isinstance(module, nn.Embedding):
        return []
    if isinstance(module, StoredLinear | TiedHead | nn.Linear) or is_conv1d(module):
        return [module]
    return [layer for child in module.children() for layer in _linear_layers(child)]
