"""The trained part of a loaded checkpoint, and what of it is stored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrcompress.finite import all_finite
from lrcompress.formats.coded import CodedWeight, Scales
from lrcompress.training.parametrised import Stored


@dataclass(frozen=True)
class Pair:
    """Both factors of a weight as parameters; see FactorPair."""

    left: nn.Parameter
    right: nn.Parameter
    pivoted: bool


class Changed(Protocol):
    """A stored tensor that training changes."""

    def value(self) -> Tensor:
        """It, as it will be stored."""

    def hold(self) -> Callable[[], None]:
        """Let the model compute with `value`, until what is returned is called."""


@dataclass(frozen=True)
class Plain:
    """A parameter in float32, stored in `dtype`."""

    parameter: nn.Parameter
    dtype: torch.dtype

    def value(self) -> Tensor:
        return self.parameter.to(self.dtype)

    def hold(self) -> Callable[[], None]:
        return _exchanged([(self.parameter, self.value())])


@dataclass(frozen=True)
class Made:
    """Tensor `leaf` of `owner`, which a parametrisation makes, stored in `dtype`."""

    owner: nn.Module
    leaf: str
    dtype: torch.dtype

    def value(self) -> Tensor:
        tensor: Tensor = getattr(self.owner, self.leaf)
        return tensor.to(self.dtype)

    def hold(self) -> Callable[[], None]:
        tensor: Tensor = getattr(self.owner, self.leaf)
        return made_of(self.owner, self.leaf).hold(tensor.to(self.dtype).to(tensor.dtype))


@dataclass(frozen=True)
class Grids:
    """The scales of a coded weight, which its gains multiply."""

    layer: CodedWeight

    def value(self) -> Tensor:
        return self.layer.trained_scales().stored()

    def hold(self) -> Callable[[], None]:
        layer, exact = self.layer, self.layer.trained_scales()
        assert layer.row_gain is not None
        assert layer.column_gain is not None
        own, nearest = layer.stored_scales(), Scales.nearest(exact.rows.detach(), exact.columns.detach())
        return _exchanged(
            [
                (layer.row_gain, nearest.rows.to(own.rows.device) / own.rows),
                (layer.column_gain, nearest.columns.to(own.columns.device) / own.columns),
            ]
        )


def _exchanged(values: list[tuple[nn.Parameter, Tensor]]) -> Callable[[], None]:
    """Set parameters; what is returned gives them back the numbers that they had."""
    before = [(parameter, parameter.detach().clone()) for parameter, _ in values]
    _set(values)
    return lambda: _set(before)


def _set(values: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in values:
        parameter.data.copy_(value)


@dataclass
class Trainable:
    """The trained part of a model: `stored` has every stored tensor that training changes, by name."""

    model: nn.Module
    stored: dict[str, Changed] = field(default_factory=dict)
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
        found = {}
        for name, changed in self.stored.items():
            with _in_words(name):
                found[name] = changed.value().to("cpu", copy=True)
            if not all_finite(found[name]):
                raise ArithmeticError(f"training made {name} non-finite: use a smaller --lr")
        return found

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """While open, the model computes with what would be stored; ArithmeticError where a number cannot be."""
        undone: list[Callable[[], None]] = []
        try:
            with torch.no_grad():
                for name, changed in self.stored.items():
                    with _in_words(name):
                        undone.append(changed.hold())
            yield
        finally:
            _undo(undone)


@contextmanager
def _in_words(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ArithmeticError(f"training made {name} impossible ({error}): use a smaller --lr") from error


def _undo(undone: list[Callable[[], None]]) -> None:
    for undo in undone:
        undo()


def parametrise(owner: nn.Module, leaf: str, made: Stored) -> None:
    """Let `made` give parameter `leaf` of `owner`; what it is made of is trained."""
    parametrize.register_parametrization(owner, leaf, made.to(getattr(owner, leaf).device))
    owner.parametrizations[leaf].original.requires_grad_(True)  # type: ignore[union-attr, index]


def made_of(owner: nn.Module, leaf: str) -> Stored:
    """The parametrisation of `leaf`."""
    found = owner.parametrizations[leaf][0]  # type: ignore[union-attr, index]
    assert isinstance(found, Stored)
    return found
