"""What a block of a ggml type is made of, and what its numbers are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.ggml.codebooks import Codebook


@dataclass
class Blocks:
    """N blocks: number = scale * step * level(code) - minimum * offset, of its block and its run of codes.

    codes (N, block) counted from 0; scale and minimum (N,) float16 numbers (powers of two) in float32; steps and
    offsets (N, runs) whole numbers. steps is None where a block has one run of step 1, minimum where a type has none.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    steps: Tensor | None = None
    offsets: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """name and number: ggml's; block: numbers a block, each run of `run` with a step of its own; size: bytes a block.

    levels: what codes 0, 1, ... stand for, in steps; steps and offsets: the smallest and largest of those numbers, None
    where there are none. has_minimum without offsets: a float16 number per block, added.
    """

    name: str
    number: int
    block: int
    run: int
    size: int
    levels: tuple[float, ...]
    steps: tuple[int, int] | None
    offsets: tuple[int, int] | None
    has_minimum: bool
    pack: Callable[[Blocks], Tensor]
    unpack: Callable[[Tensor], Blocks]
    powers: bool = False
    stride: int = 1
    book: Callable[[], Codebook] | None = None

    @property
    def uniform(self) -> bool:
        """Whether levels follow one another by one."""
        return self.levels[-1] - self.levels[0] + 1 == len(self.levels)

    def fits(self, columns: int) -> bool:
        """Whether rows of so many numbers are whole blocks."""
        return columns % self.block == 0

    def bytes_of(self, rows: int, columns: int) -> int:
        """What a (rows, columns) weight takes; columns a multiple of `block`."""
        return rows * (columns // self.block) * self.size

    def numbers(self, blocks: Blocks) -> Tensor:
        """(N, block) float32, the very numbers that llama.cpp computes with."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=blocks.codes.device)[blocks.codes.long()]
        runs = levels.reshape(len(levels), -1, self.run)
        scale = blocks.scale[:, None]
        if blocks.steps is not None:
            scale = scale * blocks.steps.float()
        numbers = runs * scale[..., None]
        if blocks.minimum is not None:
            offset = blocks.minimum[:, None]
            if blocks.offsets is not None:
                offset = offset * blocks.offsets.float()
            numbers = numbers - offset[..., None]
        return numbers.reshape(len(levels), -1)

    def dense(self, packed: Tensor) -> Tensor:
        """Weight (m, n) float32 of packed (m, n / block * size) uint8."""
        return self.numbers(self.unpack(packed.reshape(-1, self.size))).reshape(len(packed), -1)
