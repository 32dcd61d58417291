"""Block types whose neighbours share an entry of a codebook: the books, as the gguf package has them, and the bytes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lrcompress.ggml.layouts import join_halves, pack_bits, split_halves, unpack_bits

NEAR = 16
"""Entries that are tried for a group of neighbours, those nearest to what they were alone."""
SIGNS = 8
"""Neighbours whose signs are kept together."""


@dataclass(frozen=True)
class Codebook:
    """Which magnitudes `width` neighbours may have together, places counted from the smallest of `base` magnitudes.

    entries (count, width) uint8: places; place (keys,): the entry of a key, -1 where none has it; near (keys, NEAR)
    int16: the entries nearest to the magnitudes of a key. A key's digits to `base` are places, the first lowest.
    even: of eight neighbours an even number is negative, else signs are free.
    """

    base: int
    entries: Tensor
    place: Tensor
    near: Tensor
    even: bool

    @property
    def width(self) -> int:
        return self.entries.shape[1]

    def keys(self, places: Tensor) -> Tensor:
        """Keys (...) of places (..., width)."""
        digits = self.base ** torch.arange(self.width, device=places.device)
        return (places.long() * digits).sum(-1)


@cache
def _book(name: str, even: bool) -> Codebook:
    """The codebook of a ggml type."""
    from gguf import quants

    source = getattr(quants, name)
    source.init_grid()
    grid = torch.from_numpy(source.grid.copy()).reshape(source.grid_shape)
    magnitudes = torch.tensor(source.grid_map, dtype=torch.float32)
    base, width = len(magnitudes), grid.shape[1]
    entries = torch.searchsorted(magnitudes, grid).to(torch.uint8)
    digits = base ** torch.arange(width)
    every = torch.arange(base**width)
    place = torch.full((len(every),), -1)
    place[(entries.long() * digits).sum(1)] = torch.arange(len(entries))
    distance = torch.cdist(magnitudes[every[:, None] // digits % base], grid)
    near = distance.topk(NEAR, largest=False).indices.to(torch.int16).contiguous()
    return Codebook(base, entries, place, near, even)


class Layout(ABC):
    """How a block of 256 holds entries, signs and steps, its scale left out; steps are counted from 0, by 1."""

    even: ClassVar[bool]

    def __init__(self, name: str) -> None:
        self.name = name

    def book(self) -> Codebook:
        """The type's codebook, made once."""
        return _book(self.name, self.even)

    def pack(self, codes: Tensor, steps: Tensor) -> Tensor:
        """Bytes (N, size - 2) of codes (N, 256), counted from the most negative level, and steps (N, runs)."""
        book = self.book()
        negative = codes < book.base
        places = torch.where(negative, book.base - 1 - codes.long(), codes.long() - book.base)
        entries = book.place.to(codes.device)[book.keys(places.reshape(len(codes), -1, book.width))]
        return self._pack(entries, pack_bits(negative).long(), steps.long())

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and steps of the bytes of `pack`."""
        book = self.book()
        entries, signs, steps = self._unpack(packed.long())
        places = book.entries.to(packed.device)[entries].reshape(len(packed), -1)
        negative = unpack_bits(signs.to(torch.uint8)).bool()
        return torch.where(negative, book.base - 1 - places, book.base + places), steps

    @abstractmethod
    def _pack(self, entries: Tensor, signs: Tensor, steps: Tensor) -> Tensor:
        """Bytes of entries (N, 256 / width), signs (N, 32), a bit a number, and steps, all int64."""

    @abstractmethod
    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries, signs and steps of bytes, all int64."""


def _little(values: Tensor, count: int) -> Tensor:
    """Bytes (N, size * count) of values (N, size), lowest first."""
    return torch.stack([(values >> 8 * k) & 255 for k in range(count)], -1).flatten(1).to(torch.uint8)


def _whole(packed: Tensor, count: int) -> Tensor:
    """The values of the bytes of `_little`, int64."""
    parts = packed.reshape(len(packed), -1, count)
    return sum((parts[..., k] << 8 * k for k in range(count)), torch.zeros_like(parts[..., 0]))


def _all_signs(seven: Tensor) -> Tensor:
    """Eight bits of which an even number is set, of the first seven."""
    odd = sum(((seven >> k) & 1 for k in range(7)), torch.zeros_like(seven)) & 1
    return seven | (odd << 7)


def _nibbles(steps: Tensor) -> Tensor:
    return split_halves(steps, [0, 4], 1)


def _steps(packed: Tensor) -> Tensor:
    return join_halves(packed.to(torch.uint8), [0, 4], 1, 15).long()


def _pack_words(signs: Tensor, steps: Tensor) -> Tensor:
    """(N, 8) words of four times seven signs and a step."""
    seven = (signs & 127).reshape(len(signs), -1, 4)
    return sum((seven[..., k] << 7 * k for k in range(4)), steps << 28)


def _unpack_words(words: Tensor) -> tuple[Tensor, Tensor]:
    signs = torch.stack([_all_signs((words >> 7 * k) & 127) for k in range(4)], -1)
    return signs.flatten(1), words >> 28


class _Iq2Xxs(Layout):
    even = True

    def _pack(self, entries: Tensor, signs: Tensor, steps: Tensor) -> Tensor:
        groups = _whole(entries, 4) | (_pack_words(signs, steps) << 32)
        return _little(groups, 8)

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = packed.reshape(len(packed), -1, 8)
        signs, steps = _unpack_words(_whole(parts[..., 4:].flatten(1), 4))
        return parts[..., :4].flatten(1), signs, steps


class _Iq2Xs(Layout):
    even = True

    def _pack(self, entries: Tensor, signs: Tensor, steps: Tensor) -> Tensor:
        return torch.cat([_little(entries | ((signs & 127) << 9), 2), _nibbles(steps)], 1)

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words = _whole(packed[:, :64], 2)
        return words & 511, _all_signs(words >> 9), _steps(packed[:, 64:])


class _Iq2S(Layout):
    even = False

    def _pack(self, entries: Tensor, signs: Tensor, steps: Tensor) -> Tensor:
        high = split_halves(entries >> 8, [0, 2, 4, 6], 1)
        return torch.cat([_little(entries, 1), _little(signs, 1), high, _nibbles(steps)], 1)

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, signs, high, steps = packed.split([32, 32, 8, 8], 1)
        return low | (join_halves(high, [0, 2, 4, 6], 1, 3) << 8), signs, _steps(steps)


class _Iq3Xxs(Layout):
    even = True

    def _pack(self, entries: Tensor, signs: Tensor, steps: Tensor) -> Tensor:
        return torch.cat([_little(entries, 1), _little(_pack_words(signs, steps), 4)], 1)

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return packed[:, :64], *_unpack_words(_whole(packed[:, 64:], 4))


class _Iq3S(Layout):
    even = False

    def _pack(self, entries: Tensor, signs: Tensor, steps: Tensor) -> Tensor:
        return torch.cat([_little(entries, 1), pack_bits(entries >> 8), _little(signs, 1), _nibbles(steps)], 1)

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high, signs, steps = packed.split([64, 8, 32, 4], 1)
        return low | (unpack_bits(high) << 8), signs, _steps(steps)


LAYOUTS: dict[str, Layout] = {
    "IQ2_XXS": _Iq2Xxs("IQ2_XXS"),
    "IQ2_XS": _Iq2Xs("IQ2_XS"),
    "IQ2_S": _Iq2S("IQ2_S"),
    "IQ3_XXS": _Iq3Xxs("IQ3_XXS"),
    "IQ3_S": _Iq3S("IQ3_S"),
}
"""By ggml's name."""
