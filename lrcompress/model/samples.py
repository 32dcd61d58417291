"""What a model reads at once: tokens, or tokens and images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNSCORED = -100
"""A label that no loss counts, as torch has it."""

Reads = Mapping[str, Tensor]
"""What the whole model is called with, by argument, tokens among it."""


@dataclass(frozen=True, eq=False)
class Sample:
    """ids (length,) int64: tokens. Of a sample with images `look` reads them anew, `seen` (length,) bool is True where
    a token only keeps an image's place, `digest` tells what was read from others, `images` is their number."""

    ids: Tensor
    look: Callable[[], Reads] | None = None
    seen: Tensor | None = None
    digest: str = ""
    images: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def words(self) -> Tensor:
        """(length,) the tokens, 0 in the place of images: those a model may have no row for."""
        return self.ids if self.seen is None else self.ids.masked_fill(self.seen, 0)

    @property
    def written(self) -> Tensor:
        """(words,) the tokens of the text alone."""
        return self.ids if self.seen is None else self.ids[~self.seen]

    @property
    def labels(self) -> Tensor:
        """(length,) the tokens as labels, UNSCORED in the place of images."""
        return self.ids if self.seen is None else self.ids.masked_fill(self.seen, UNSCORED)


def sample_of(row: Sample | Tensor) -> Sample:
    """A row of tokens is a sample of text alone."""
    return Sample(row) if isinstance(row, Tensor) else row


def samples_of(rows: Tensor | Sequence[Sample]) -> list[Sample]:
    """(samples, length) tokens, or samples, as samples."""
    return [sample_of(row) for row in rows]


def as_rows(samples: Sequence[Sample], length: int) -> Tensor:
    """(samples, length) tokens of samples that are all so long."""
    return torch.stack([sample.ids for sample in samples]) if samples else torch.zeros(0, length, dtype=torch.int64)
