"""Tensors that transformers joins, splits or turns on loading, read under the names that they have in the model."""

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.model.skeleton import Renaming, library_errors


@dataclass
class Conversion:
    """`first`: the model's name for the first tensor that it makes; sources: stored names by pattern.

    again: whether a tensor that is stored as the model has it would be converted once more.
    """

    first: str
    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)
    again: bool = False

    @property
    def stored(self) -> list[str]:
        """All stored names that it reads."""
        return [name for names in self.sources.values() for name in names]

    def __call__(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name from the stored ones by name."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.first, name, pattern, tensors[name])
        with library_errors(f"{self.first} cannot be made from {self.stored[0]} and what belongs to it"):
            made: dict[str, Any] = converter.convert(self.first, model=model, config=model.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}


class ConvertedReader(CheckpointReader):
    """A folder read as `model` has it, by transformers' own conversions; experts that they fuse are left as stored."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        super().__init__(folder)
        self._of, self._made_as = model, dict[str, Conversion]()
        self._made_shapes: dict[str, Tensor] = {}
        found, state, renaming = dict[str, Conversion](), model.state_dict(), Renaming(model)
        for stored in renaming.in_order(super().names()):
            name, pattern = renaming(stored, state)
            if pattern is not None and name in state:
                conversion = found.setdefault(name, Conversion(name, renaming.converter(pattern)))
                conversion.sources.setdefault(pattern, []).append(stored)
        for conversion in found.values():
            made = conversion(model, {name: super(ConvertedReader, self).meta(name) for name in conversion.stored})
            conversion.again = any(renaming(name, state)[1] is not None for name in made)
            self._made_as |= dict.fromkeys(made, conversion)
            self._made_shapes |= made
        self._used = {name for conversion in found.values() for name in conversion.stored}

    def made(self) -> Collection[str]:
        """See CheckpointReader."""
        return self._made_as.keys()

    def kept_as(self, name: str) -> list[str]:
        """See CheckpointReader: those whose conversion would change what it made once more."""
        conversion = self._made_as.get(name)
        return conversion.stored if conversion is not None and conversion.again else []

    def names(self) -> list[str]:
        """Names of all tensors, sorted: converted ones as the model calls them."""
        return sorted([*(name for name in super().names() if name not in self._used), *self._made_as])

    def meta(self, name: str) -> Tensor:
        """See CheckpointReader."""
        return self._made_shapes[name] if name in self._made_shapes else super().meta(name)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """See CheckpointReader."""
        yield from super().read([name for name in names if name not in self._made_as])
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name in self._made_as:
                wanted.setdefault(self._made_as[name].first, []).append(name)
        for first, parts in wanted.items():
            conversion = self._made_as[first]
            made = conversion(self._of, dict(super().read(conversion.stored)))
            for name in parts:
                yield name, made[name].contiguous()

    def will_read(self, names: Sequence[str]) -> None:
        """See CheckpointReader."""
        stored = [source for name in names if name in self._made_as for source in self._made_as[name].stored]
        super().will_read([*(name for name in names if name not in self._made_as), *dict.fromkeys(stored)])
