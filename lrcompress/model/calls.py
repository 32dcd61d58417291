"""How a model calls its blocks: what they are given, and what they give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrcompress.model.carried import Handed


@dataclass
class Call:
    """How the model called a block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_key: str | None
    tuple_length: int
    """0 where the block returns a tensor, else the length of the tuple that begins with it."""


class Probed:
    """What a run of the whole model shows.

    groups: site to the first one that reads the same; handed: what enters the first block and leaves each, without
    numbers; handed_on: whether blocks hand each other more than hidden states; between: whether the model does
    something with these between two blocks.
    """

    def __init__(self) -> None:
        self.groups: dict[str, str] = {}
        self.handed: list[Handed] = []
        self.handed_on = self.between = False
        self.kept: Mapping[Any, Any] = {}
        self.logits = torch.empty(0)

    def note(self, handed: Handed) -> None:
        """Add what enters the first block, or leaves the next."""
        self.kept = handed.kept
        self.handed.append(handed.filled([tensor.to("meta") for tensor in handed.tensors()]))


def handed_by(output: Any, into: dict[Any, Any], before: Mapping[Any, Any]) -> Handed:
    """What a block hands on by its output and by what it, or others `before`, put into the containers of its call."""
    length = tuple_length(output)
    kept = {**before, **{place: copied(content) for place, content in into.items()}}
    return Handed(output[0] if length else output, list(output[1:]) if length else [], kept)


def copied(content: Any) -> Any:
    """A container of the same tensors."""
    return dict(content) if isinstance(content, Mapping) else list(content)


def handing_on(handed: Handed, length: int) -> Any:
    """What a block returns that only hands on what others did."""
    extras = [*handed.extras, *[None] * length][: max(0, length - 1)]
    return (handed.hidden, *extras) if length else handed.hidden


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's call with other hidden states."""
    _, key = hidden_of(args, kwargs)
    return ((hidden, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: hidden})


def same_calls(one: Sequence[Call], two: Sequence[Call]) -> bool:
    """Whether blocks were called alike for two texts: if not, one text's calls are not another's."""
    return all(_same(a.args, b.args) and _same(a.kwargs, b.kwargs) for a, b in zip(one, two, strict=True))


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any], key: str | None, length: int) -> Call:
    """A block's call, without the hidden states that came by keyword `key`, or first."""
    rest = {k: v for k, v in kwargs.items() if k != key}
    return Call(args[1:] if key is None else args, rest, key, length)


def tuple_length(output: Any) -> int:
    """The length of a block's output where it is a tuple or a list, 0 where it is a tensor."""
    return len(output) if isinstance(output, (tuple, list)) else 0


def with_first(output: Any, hidden: Tensor) -> Any:
    """A block's output with other hidden states; a named tuple stays one."""
    if not tuple_length(output):
        return hidden
    return type(output)(*[hidden, *output[1:]]) if hasattr(output, "_fields") else type(output)([hidden, *output[1:]])


def passed_on(hidden: Tensor, length: int) -> Any:
    """What a block returns that leaves the hidden states as they are."""
    return (hidden, *[None] * (length - 1)) if length else hidden


def _same(one: Any, two: Any) -> bool:
    """Whether all tensors in two arguments of a block, or within their containers, are equal."""
    if torch.is_tensor(one) or torch.is_tensor(two):
        return torch.is_tensor(one) and torch.is_tensor(two) and torch.equal(one, two)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return len(one) == len(two) and all(map(_same, one, two))
    return True


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, str | None]:
    """The hidden states of a block's call, and the keyword they came by (None: first positional argument)."""
    if args:
        return args[0], None
    key = "hidden_states" if "hidden_states" in kwargs else next(k for k, v in kwargs.items() if torch.is_tensor(v))
    return kwargs[key], key
