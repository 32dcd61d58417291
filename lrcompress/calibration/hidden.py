"""Hidden states between blocks, in a scratch file rather than in memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """(samples, length, width) in a file, read and written a sample at a time; file pages are not resident memory."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
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
        new = HiddenStates(self.path.with_suffix(".tmp"), self.shape, self.dtype)
        yield new
        os.replace(new.path, self.path)

    def write(self, index: int, hidden: Tensor) -> None:
        """Store sample `index`, (1, length, width)."""
        raw = hidden.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(index * self._slice)
            file.write(raw.data)

    def read(self, index: int) -> Tensor:
        """Sample `index` on the CPU, (1, length, width)."""
        with self.path.open("rb") as file:
            file.seek(index * self._slice)
            raw = bytearray(self._slice)
            if file.readinto(raw) != self._slice:
                raise EOFError(f"{self.path} ends within sample {index}: it was changed while it was read")
        return torch.frombuffer(raw, dtype=self.dtype).view(1, *self.shape[1:])
