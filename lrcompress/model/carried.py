"""What a sample carries from block to block, in one tensor: hidden states, its tokens, and what blocks hand each other.

Some blocks read more than hidden states: embeddings of the text for every block, keys and values of an earlier block,
the tokens that an earlier block chose. All of it has a place for every token, so it lies beside the hidden states as
more channels, and passes through files and gradients as they do. Whole numbers are written digit by digit to the base
256, which every floating dtype holds exactly.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BASE, DIGITS = 256, 4


@dataclass
class Handed:
    """What a block gives to those after it: its output's tensors beside the hidden states, and what it keeps in
    containers that it was called with, by the place of each in the call."""

    hidden: Tensor
    extras: Sequence[Any] = ()
    kept: Mapping[Any, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All of them, hidden states first."""
        return [self.hidden, *tensors_in(list(self.extras)), *tensors_in(dict(self.kept))]

    def filled(self, tensors: Sequence[Tensor]) -> "Handed":
        """The same with other tensors in their places."""
        following = iter(tensors[1:])
        return Handed(tensors[0], replaced(list(self.extras), following), replaced(dict(self.kept), following))


@dataclass(frozen=True)
class Place:
    """Of one tensor of some shape and dtype, dimension `along` of which is that of the tokens, None where none is."""

    shape: tuple[int, ...]
    along: int | None
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """Numbers a token."""
        rest = [size for place, size in enumerate(self.shape) if place != self.along]
        return int(torch.Size(rest).numel()) * (1 if self.dtype.is_floating_point else DIGITS)

    def pack(self, tensor: Tensor, length: int) -> Tensor:
        """(length, channels) of floating numbers."""
        if self.along is None:
            rows = tensor.reshape(1, -1).expand(length, -1)
        else:
            rows = tensor.movedim(self.along, 0).reshape(length, -1)
        return rows if self.dtype.is_floating_point else digits(rows)

    def unpack(self, rows: Tensor) -> Tensor:
        """The tensor again; as many tokens as there are rows."""
        values = rows if self.dtype.is_floating_point else whole(rows)
        values = values.to(self.dtype)
        if self.along is None:
            return values[0].reshape(self.shape)
        rest = [size for place, size in enumerate(self.shape) if place != self.along]
        return values.reshape(len(rows), *rest).movedim(0, self.along)


def digits(rows: Tensor) -> Tensor:
    """(rows, columns · DIGITS) of whole numbers between -2³¹ and 2³¹, as floating ones below BASE."""
    positive = rows.long() + BASE**DIGITS // 2
    return torch.stack([positive // BASE**place % BASE for place in range(DIGITS)], -1).flatten(1).float()


def whole(rows: Tensor) -> Tensor:
    """The inverse of `digits`."""
    powers = torch.tensor([BASE**place for place in range(DIGITS)], device=rows.device)
    return (rows.long().unflatten(1, (-1, DIGITS)) * powers).sum(-1) - BASE**DIGITS // 2


class Layout:
    """Where everything lies that is carried into a block, or out of the last one: `known` with its tensors' places."""

    def __init__(self, known: Handed, short: Handed, lengths: tuple[int, int]) -> None:
        """`known` and `short` are what texts of two lengths hand on; ValueError where that differs in more."""
        pairs = list(zip(known.tensors(), short.tensors(), strict=True))
        self.places = [Place(tuple(a.shape), _along(a.shape, b.shape, lengths), a.dtype) for a, b in pairs]
        if self.places[0].along is None:
            raise ValueError("hidden states without a dimension of tokens")
        self._known = known.filled([tensor.to("meta") for tensor in known.tensors()])
        self.tokens = Place((1, lengths[0]), 1, torch.int64)
        self.channels = sum(place.channels for place in (*self.places, self.tokens))

    def pack(self, ids: Tensor, handed: Handed, width: int, dtype: torch.dtype) -> Tensor:
        """(1, length, width): hidden states, the tokens (length,), everything else, and zeros up to the width."""
        hidden, *others = handed.tensors()
        length = len(ids)
        parts = [self.places[0].pack(hidden, length), self.tokens.pack(ids[None], length)]
        parts += [place.pack(tensor, length) for place, tensor in zip(self.places[1:], others, strict=True)]
        packed = torch.cat([part.to(hidden.device, dtype) for part in parts], 1)
        return torch.nn.functional.pad(packed, (0, width - self.channels))[None]

    def unpack(self, state: Tensor) -> tuple[Tensor, Handed]:
        """The tokens (length,) and what was handed on."""
        sizes = [place.channels for place in (self.places[0], self.tokens, *self.places[1:])]
        hidden, tokens, *others = state[0, :, : self.channels].split(sizes, 1)
        tensors = [place.unpack(rows) for place, rows in zip(self.places, (hidden, *others), strict=True)]
        return self.tokens.unpack(tokens.detach())[0], self._known.filled(tensors)

    def hidden(self, state: Tensor) -> Tensor:
        """The hidden states alone, as the block gave them, of a state that may be a part of the text."""
        return self.places[0].unpack(state[0, :, : self.places[0].channels])


def _along(shape: Sequence[int], short: Sequence[int], lengths: tuple[int, int]) -> int | None:
    """The first dimension that is as long as the text, for both lengths."""
    if len(shape) != len(short):
        raise ValueError("tensors with more dimensions for a longer text")
    return next((i for i, sizes in enumerate(zip(shape, short, strict=True)) if sizes == lengths), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value or within its containers, in order."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors_in(inner)


def replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with the next of `tensors` in the place of each of its own; containers become plain ones."""
    if torch.is_tensor(value):
        return next(tensors)
    if isinstance(value, Mapping):
        return {key: replaced(inner, tensors) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        found = [replaced(inner, tensors) for inner in value]
        return found if isinstance(value, list) else tuple(found)
    return value


def containers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """What a block is called with that it can put something into, by its place in the call."""
    places: dict[Any, Any] = dict(enumerate(args))
    places.update(kwargs)
    return {place: value for place, value in places.items() if isinstance(value, (MutableMapping, list))}


def put(container: Any, content: Any) -> None:
    """Give a container other content."""
    container.clear()
    if isinstance(container, MutableMapping):
        container.update(content)
    else:
        container.extend(content)
