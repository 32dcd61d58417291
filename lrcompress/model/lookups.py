"""The input embeddings as a weight: where they are, what reads the same matrix, what is done to a row."""

import copy

import torch
from torch import nn

from lrcompress.errors import InputError
from lrcompress.formats.table import Table, table_like
from lrcompress.protocols import Spec


def input_embeddings(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """Name and module of what tokens are looked up in, None where that is no nn.Embedding."""
    found: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(found, nn.Embedding) or min(found.weight.shape) < 2:
        return None
    return next(name for name, module in model.named_modules() if module is found), found


def readers_of(model: nn.Module, name: str) -> list[str]:
    """Other modules with the same weight as module `name`."""
    weight = model.get_submodule(name).weight
    return [other for other, module in model.named_modules() if other != name and _weight(module) is weight]


def _weight(module: nn.Module) -> object:
    return module._parameters.get("weight")


def row_scale(module: nn.Embedding) -> float:
    """What a row is multiplied by when it is looked up, as in Gemma; InputError where more is done to it.

    A subclass is tried with small numbers in the place of its matrix, as it lies and as a table of codes.
    """
    tried, matrix = copy.copy(module), torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.5, -1.0], [-8.0, 2.0, 1.0]])
    ids = torch.tensor([[2, 0, 1, 2]])
    tried._parameters, tried._modules = {"weight": nn.Parameter(matrix, requires_grad=False)}, {}
    tried.padding_idx = None
    table = table_like(tried, Table(Spec("table", (3, 3), parameters={"length": 1}), torch.float32))
    table.table = nn.Embedding(len(matrix), len(matrix), _weight=matrix)
    rows = matrix[ids]
    try:
        found, coded = tried(ids), table(ids)
        scale = float(found[0, 0, 0] / rows[0, 0, 0])
        if module.max_norm is None and torch.equal(found, coded) and torch.allclose(found, scale * rows, atol=0):
            return scale
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        pass
    raise InputError(
        f"the input embeddings ({type(module).__name__}) do more to a row than multiply it by a number: leave them out "
        "of the targets"
    )
