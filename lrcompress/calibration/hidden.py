"""Hidden states between blocks, in a scratch file rather than in memory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.model.samples import Sample


class HiddenStates:
    """(samples, length, width) in a file, read and written a sample at a time; file pages are not resident memory.

    `samples` are those that they are of, where one of them may be shorter than `length` or holds images.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, samples: Sequence[Sample] = ()
    ) -> None:
        self.path, self.shape, self.dtype, self._samples = path, shape, dtype, samples
        self._slice = shape[1] * shape[2] * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return self.shape[0] * self._slice

    def whole(self) -> bool:
        """Whether the file is there and has its size."""
        return self.path.is_file() and self.path.stat().st_size == self.bytes

    @contextmanager
    def replaced(self) -> "Iterator[HiddenStates]":
        """Hidden states to write all samples of, which become this file whole; where that fails, nothing changes."""
        new = HiddenStates(self.path.with_suffix(".tmp"), self.shape, self.dtype, self._samples)
        yield new
        os.replace(new.path, self.path)

    def sample(self, index: int) -> Sample | None:
        """The sample that the hidden states `index` are of, where that is known."""
        return self._samples[index] if self._samples else None

    def length(self, index: int) -> int:
        """Tokens of sample `index`."""
        return len(self._samples[index]) if self._samples else self.shape[1]

    def write(self, index: int, hidden: Tensor) -> None:
        """Store sample `index`, (1, length, width)."""
        hidden = nn.functional.pad(hidden, (0, 0, 0, self.shape[1] - hidden.shape[1]))
        raw = hidden.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(index * self._slice)
            file.write(raw.data)

    def read(self, index: int) -> Tensor:
        """Sample `index` on the CPU, (1, its length, width)."""
        with self.path.open("rb") as file:
            file.seek(index * self._slice)
            raw = bytearray(self._slice)
            if file.readinto(raw) != self._slice:
                raise EOFError(f"{self.path} ends within sample {index}: it was changed while it was read")
        states = torch.frombuffer(raw, dtype=self.dtype).view(1, *self.shape[1:])
        return states[:, : self.length(index)]
