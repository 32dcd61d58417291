"""Which tensors of a loaded checkpoint are trained, how they are parametrised, and what of them is stored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.formats import StoredLinear
from lrcompress.formats.low_rank import LowRank
from lrcompress.formats.sum import Sum
from lrcompress.linalg.truncation import retruncate
from lrcompress.model.skeleton import find_blocks
from lrcompress.model.surgery import stored_layers

PRINCIPAL_SHARE = 0.05
"""LIFT trains the largest entries after rank reduction, this share of them (arXiv 2506.00772)."""

PRINCIPAL_RANK = 1 / 8
"""Rank that a dense weight is reduced to before its largest entries are looked for, of its full rank."""


class Stored(nn.Module):
    """A parametrisation of a stored tensor; while `rounded` is set, it gives the tensor as the file will hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: torch.dtype | None = None

    def forward(self, trained: Tensor) -> Tensor:
        """The tensor for what is trained."""
        made = self.make(trained)
        return made if self.rounded is None else made.to(self.rounded).to(made.dtype)

    def make(self, trained: Tensor) -> Tensor:
        """`forward` before rounding."""
        raise NotImplementedError


class SingularValues(Stored):
    """left · diag(relative) · right with left (a, r) or nothing and right (r, n) fixed: SVFit (arXiv 2409.05926).

    `right` carries the singular values, so that what is trained, (r,), begins at one and moves by fractions of them.
    """

    left: Tensor | None
    right: Tensor

    def __init__(self, left: Tensor | None, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def make(self, trained: Tensor) -> Tensor:
        scaled = trained[:, None] * self.right
        return scaled if self.left is None else self.left @ scaled

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained where nothing has been."""
        return weight.new_ones(len(self.right))


class Entries(Stored):
    """A tensor whose entries at `index` (k,) are trained, (k,), the others fixed."""

    base: Tensor
    index: Tensor

    def __init__(self, base: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base)
        self.register_buffer("index", index)

    def make(self, trained: Tensor) -> Tensor:
        return self.base.flatten().index_copy(0, self.index, trained).view_as(self.base)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained where nothing has been."""
        return weight.flatten()[self.index]


@dataclass(frozen=True)
class Pair:
    """Both factors of a weight as parameters; see FactorPair."""

    left: nn.Parameter
    right: nn.Parameter
    pivoted: bool


@dataclass
class Trainable:
    """The trained part of a model: `dtypes` names every stored tensor that training changes, as the file has it."""

    model: nn.Module
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves, pairs included."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """The changed tensors by name, on the CPU, as they will be stored; a non-finite one is an ArithmeticError."""
        found = {name: self._tensor(name).to("cpu", dtype, copy=True) for name, dtype in self.dtypes.items()}
        for name, tensor in found.items():
            if not all_finite(tensor):
                raise ArithmeticError(f"training made {name} non-finite: use a smaller --lr")
        return found

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """While open, the model computes with the numbers that would be stored."""
        plain = [name for name in self.dtypes if self._made(name) is None]
        exact = {name: self._tensor(name).detach().clone() for name in plain}
        try:
            for name, dtype in self.dtypes.items():
                if (made := self._made(name)) is None:
                    self._tensor(name).data.copy_(exact[name].to(dtype))
                else:
                    made.rounded = dtype
            yield
        finally:
            for name in self.dtypes:
                if (made := self._made(name)) is None:
                    self._tensor(name).data.copy_(exact[name])
                else:
                    made.rounded = None

    def _tensor(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(module), leaf)
        return tensor

    def _made(self, name: str) -> Stored | None:
        """The parametrisation of tensor `name`, None where it is a parameter itself."""
        module, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(module)
        if not parametrize.is_parametrized(owner, leaf):
            return None
        found = owner.parametrizations[leaf][0]  # type: ignore[union-attr, index]
        assert isinstance(found, Stored)
        return found


def choose(model: nn.Module, what: str, reader: CheckpointReader) -> Trainable:
    """Set up `model`, loaded from the files of `reader`, so that only what `what` names is trained, in float32."""
    model.requires_grad_(False)
    found = Trainable(model)
    CHOICES[what](found, reader)
    if not found.count:
        raise InputError(f"--train {what} finds nothing to train in this checkpoint: {NOTHING[what]}")
    return found


def _train(found: Trainable, reader: CheckpointReader, name: str) -> None:
    """Mark the parameter `name` as trained, with a float32 master copy."""
    parameter = found.model.get_parameter(name)
    parameter.data = parameter.data.float()
    found.dtypes[name] = reader.meta(name).dtype
    parameter.requires_grad_(True)


def _train_factors(found: Trainable, reader: CheckpointReader, layers: dict[str, StoredLinear]) -> None:
    for stem, layer in layers.items():
        for name in layer.factor_names():
            _train(found, reader, f"{stem}.{name}")
        if (pair := layer.factor_pair()) is not None:
            left, right = (layer.get_parameter(name) for name in (pair.left, pair.right))
            found.pairs.append(Pair(left, right, pair.pivoted))


def _factors(found: Trainable, reader: CheckpointReader) -> None:
    _train_factors(found, reader, stored_layers(found.model))


def _low_rank_components(found: Trainable, reader: CheckpointReader) -> None:
    """WeLore's rule (arXiv 2407.11239): a component is low-rank where half of its rank or more has gone."""
    layers = stored_layers(found.model)
    low = {n: m for n, m in layers.items() if m.factor_pair() and 2 * m.spec.rank <= min(m.spec.shape)}
    _train_factors(found, reader, low)


def _singular_values(found: Trainable, reader: CheckpointReader) -> None:
    layers = stored_layers(found.model)
    followed = {layer.spec.owner for layer in layers.values()}
    for stem, layer in layers.items():
        pair = layer.factor_pair()
        if pair is None:
            if isinstance(layer, Sum):
                _train(found, reader, f"{stem}.scale")  # of the components of a correction in codes
            continue
        left, right = (layer.get_parameter(name) for name in (pair.left, pair.right))
        left.data, right.data = left.data.float(), right.data.float()
        names = [f"{stem}.{pair.left}", f"{stem}.{pair.right}"]
        if pair.pivoted:
            unfolded = torch.cat([torch.eye(len(right), dtype=left.dtype, device=left.device), left.detach()])
            spectrum = retruncate(unfolded, right.detach())
            made = SingularValues(spectrum.left[: len(right)].float(), spectrum.right.float())
            names = names[1:]
        elif stem in followed:  # others multiply by the right factor too: its own singular values move, as it lies
            spectrum = retruncate(torch.eye(len(right), dtype=right.dtype, device=right.device), right.detach())
            made = SingularValues(spectrum.left.float(), spectrum.right.float())
            names = names[1:]
        else:
            spectrum = retruncate(left.detach(), right.detach())
            balanced = LowRank.encode(spectrum.left, spectrum.right, None)
            left.data = balanced["B.weight"].to(left.device, left.dtype)
            made = SingularValues(None, balanced["A.weight"].to(right.dtype))
        for name in names:
            found.dtypes[name] = reader.meta(name).dtype
        _parametrise(found.model, f"{stem}.{pair.right}", made)


def _parametrise(model: nn.Module, name: str, made: Stored) -> None:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    parametrize.register_parametrization(owner, leaf, made.to(getattr(owner, leaf).device))
    owner.parametrizations[leaf].original.requires_grad_(True)  # type: ignore[union-attr, index]


def _principal(found: Trainable, reader: CheckpointReader) -> None:
    for name in dense_weights(found.model):
        weight = found.model.get_parameter(name)
        weight.data = weight.data.float()
        reduced = _rank_reduced(weight.detach(), max(1, round(PRINCIPAL_RANK * min(weight.shape))))
        count = max(1, round(PRINCIPAL_SHARE * weight.numel()))
        index = reduced.abs().flatten().topk(count, sorted=False).indices.sort().values
        found.dtypes[name] = reader.meta(name).dtype
        _parametrise(found.model, name, Entries(weight.detach().clone(), index))


def _rank_reduced(weight: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank."""
    tall = weight.double() if weight.shape[0] >= weight.shape[1] else weight.double().T
    basis = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:]
    reduced = (tall @ basis) @ basis.T
    return reduced if weight.shape[0] >= weight.shape[1] else reduced.T


def dense_weights(model: nn.Module) -> list[str]:
    """Names of the weights of the blocks' linear layers that no format stores."""
    from transformers.pytorch_utils import Conv1D

    blocks = tuple(block + "." for block in find_blocks(model))
    stored = tuple(name + "." for name in stored_layers(model))
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(blocks) and not f"{name}.".startswith(stored)
    ]


def _norms(found: Trainable, reader: CheckpointReader) -> None:
    stored = tuple(name + "." for name in stored_layers(found.model))
    for stem, module in found.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and all(p.dim() == 1 for p in own.values()) and not f"{stem}.".startswith(stored):
            for name in own:
                _train(found, reader, f"{stem}.{name}")


def _everything(found: Trainable, reader: CheckpointReader) -> None:
    layers = stored_layers(found.model)
    _train_factors(found, reader, layers)
    stored, present = tuple(name + "." for name in layers), set(reader.names())
    for name, parameter in found.model.named_parameters(remove_duplicate=False):
        # A tied tensor lies in the files under one of its names.
        if not parameter.requires_grad and not name.startswith(stored) and name in present:
            _train(found, reader, name)


Choose = Callable[[Trainable, CheckpointReader], Any]
CHOICES: dict[str, Choose] = {
    "factors": _factors,
    "lrc": _low_rank_components,
    "singular-values": _singular_values,
    "principal": _principal,
    "norms": _norms,
    "all": _everything,
}
NOTHING = {
    "factors": "its weights are all quantised; use --train norms",
    "lrc": "no factorised weight lost half of its rank; use --train factors",
    "singular-values": "no weight has a low-rank part; use --train factors",
    "principal": "no weight of its blocks is dense; use --train factors",
    "norms": "it has no normalisation with weights; use --train factors",
    "all": "it has no floating-point weights",
}
