"""ggml's block types: what numbers a block can hold, and its bytes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.ggml import layouts

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What a code of IQ4_NL and IQ4_XS stands for, in scales."""


@dataclass
class Blocks:
    """N blocks: number = scale * step * level(code) - minimum * offset, of its block and its run of codes.

    codes (N, block) counted from 0; scale and minimum (N,) float16 numbers in float32; steps and offsets (N, runs)
    whole numbers. steps is None where a block has one run of step 1, minimum where a type has none.
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
    levels: tuple[int, ...]
    steps: tuple[int, int] | None
    offsets: tuple[int, int] | None
    has_minimum: bool
    pack: Callable[[Blocks], Tensor]
    unpack: Callable[[Tensor], Blocks]

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


def _pack_plain(bits: int, *, minimum: bool) -> Callable[[Blocks], Tensor]:
    def pack(blocks: Blocks) -> Tensor:
        parts = [layouts.half_bytes(blocks.scale)]
        if minimum:
            assert blocks.minimum is not None
            parts.append(layouts.half_bytes(-blocks.minimum))
        codes = blocks.codes.to(torch.uint8)
        if bits == 8:
            return torch.cat([*parts, codes - 128], 1)
        if bits == 5:
            parts.append(layouts.pack_bits(codes >> 4))
        return torch.cat([*parts, layouts.split_halves(codes & 15, [0, 4], 16)], 1)

    return pack


def _unpack_plain(bits: int, *, minimum: bool) -> Callable[[Tensor], Blocks]:
    def unpack(packed: Tensor) -> Blocks:
        scale, rest = layouts.half_values(packed[:, :2]), packed[:, 2:]
        lowest = None
        if minimum:
            lowest, rest = -layouts.half_values(rest[:, :2]), rest[:, 2:]
        if bits == 8:
            return Blocks(rest + 128, scale)
        high = None
        if bits == 5:
            high, rest = layouts.unpack_bits(rest[:, :4]), rest[:, 4:]
        codes = layouts.join_halves(rest, [0, 4], 16, 15)
        return Blocks(codes if high is None else codes | (high << 4), scale, lowest)

    return unpack


def _pack_q2_k(blocks: Blocks) -> Tensor:
    assert blocks.steps is not None
    assert blocks.offsets is not None
    assert blocks.minimum is not None
    steps = blocks.steps.to(torch.uint8) | (blocks.offsets.to(torch.uint8) << 4)
    codes = layouts.split_halves(blocks.codes, [0, 2, 4, 6], 32)
    return torch.cat([steps, codes, layouts.half_bytes(blocks.scale), layouts.half_bytes(blocks.minimum)], 1)


def _unpack_q2_k(packed: Tensor) -> Blocks:
    codes = layouts.join_halves(packed[:, 16:80], [0, 2, 4, 6], 32, 3)
    scale, minimum = layouts.half_values(packed[:, 80:82]), layouts.half_values(packed[:, 82:84])
    return Blocks(codes, scale, minimum, packed[:, :16] & 15, packed[:, :16] >> 4)


def _pack_q3_k(blocks: Blocks) -> Tensor:
    assert blocks.steps is not None
    codes = blocks.codes.to(torch.uint8)
    high = layouts.split_halves(codes >> 2, list(range(8)), 32)
    low = layouts.split_halves(codes & 3, [0, 2, 4, 6], 32)
    return torch.cat([high, low, layouts.pack_six_bits(blocks.steps + 32), layouts.half_bytes(blocks.scale)], 1)


def _unpack_q3_k(packed: Tensor) -> Blocks:
    high = layouts.join_halves(packed[:, :32], list(range(8)), 32, 1)
    low = layouts.join_halves(packed[:, 32:96], [0, 2, 4, 6], 32, 3)
    steps = layouts.unpack_six_bits(packed[:, 96:108]).to(torch.int8) - 32
    return Blocks(low | (high << 2), layouts.half_values(packed[:, 108:110]), steps=steps)


def _pack_q4_k(blocks: Blocks) -> Tensor:
    assert blocks.steps is not None
    assert blocks.offsets is not None
    assert blocks.minimum is not None
    head = [layouts.half_bytes(blocks.scale), layouts.half_bytes(blocks.minimum)]
    pairs = layouts.pack_six_bit_pairs(blocks.steps, blocks.offsets)
    return torch.cat([*head, pairs, layouts.split_halves(blocks.codes, [0, 4], 32)], 1)


def _unpack_q4_k(packed: Tensor) -> Blocks:
    scale, minimum = layouts.half_values(packed[:, :2]), layouts.half_values(packed[:, 2:4])
    steps, offsets = layouts.unpack_six_bit_pairs(packed[:, 4:16])
    return Blocks(layouts.join_halves(packed[:, 16:], [0, 4], 32, 15), scale, minimum, steps, offsets)


def _pack_q5_k(blocks: Blocks) -> Tensor:
    codes = blocks.codes.to(torch.uint8)
    packed = _pack_q4_k(Blocks(codes & 15, blocks.scale, blocks.minimum, blocks.steps, blocks.offsets))
    high = layouts.split_halves(codes >> 4, list(range(8)), 32)
    return torch.cat([packed[:, :16], high, packed[:, 16:]], 1)


def _unpack_q5_k(packed: Tensor) -> Blocks:
    found = _unpack_q4_k(torch.cat([packed[:, :16], packed[:, 48:]], 1))
    found.codes = found.codes | (layouts.join_halves(packed[:, 16:48], list(range(8)), 32, 1) << 4)
    return found


def _pack_q6_k(blocks: Blocks) -> Tensor:
    assert blocks.steps is not None
    codes = blocks.codes.to(torch.uint8)
    low, high = layouts.split_halves(codes & 15, [0, 4], 64), layouts.split_halves(codes >> 4, [0, 2, 4, 6], 32)
    return torch.cat([low, high, blocks.steps.to(torch.int8).view(torch.uint8), layouts.half_bytes(blocks.scale)], 1)


def _unpack_q6_k(packed: Tensor) -> Blocks:
    low = layouts.join_halves(packed[:, :128], [0, 4], 64, 15)
    high = layouts.join_halves(packed[:, 128:192], [0, 2, 4, 6], 32, 3)
    steps = packed[:, 192:208].contiguous().view(torch.int8)
    return Blocks(low | (high << 4), layouts.half_values(packed[:, 208:210]), steps=steps)


def _pack_iq4_xs(blocks: Blocks) -> Tensor:
    assert blocks.steps is not None
    steps = (blocks.steps + 32).to(torch.uint8)
    high = layouts.split_halves(steps >> 4, [0, 2, 4, 6], 1)
    low = layouts.split_halves(steps & 15, [0, 4], 1)
    codes = layouts.split_halves(blocks.codes, [0, 4], 16)
    return torch.cat([layouts.half_bytes(blocks.scale), high, low, codes], 1)


def _unpack_iq4_xs(packed: Tensor) -> Blocks:
    high = layouts.join_halves(packed[:, 2:4], [0, 2, 4, 6], 1, 3)
    low = layouts.join_halves(packed[:, 4:8], [0, 4], 1, 15)
    steps = (low | (high << 4)).to(torch.int8) - 32
    return Blocks(layouts.join_halves(packed[:, 8:], [0, 4], 16, 15), layouts.half_values(packed[:, :2]), steps=steps)


def _levels(bits: int, lowest: int = 0) -> tuple[int, ...]:
    return tuple(range(lowest, lowest + 2**bits))


def _plain(name: str, number: int, bits: int, size: int, *, minimum: bool) -> BlockType:
    levels = _levels(bits, 0 if minimum else -(2 ** (bits - 1)))
    pack, unpack = _pack_plain(bits, minimum=minimum), _unpack_plain(bits, minimum=minimum)
    return BlockType(name, number, 32, 32, size, levels, None, None, minimum, pack, unpack)


BLOCK_TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        _plain("Q4_0", 2, 4, 18, minimum=False),
        _plain("Q4_1", 3, 4, 20, minimum=True),
        _plain("Q5_0", 6, 5, 22, minimum=False),
        _plain("Q5_1", 7, 5, 24, minimum=True),
        _plain("Q8_0", 8, 8, 34, minimum=False),
        BlockType("Q2_K", 10, 256, 16, 84, _levels(2), (0, 15), (0, 15), True, _pack_q2_k, _unpack_q2_k),
        BlockType("Q3_K", 11, 256, 16, 110, _levels(3, -4), (-32, 31), None, False, _pack_q3_k, _unpack_q3_k),
        BlockType("Q4_K", 12, 256, 32, 144, _levels(4), (0, 63), (0, 63), True, _pack_q4_k, _unpack_q4_k),
        BlockType("Q5_K", 13, 256, 32, 176, _levels(5), (0, 63), (0, 63), True, _pack_q5_k, _unpack_q5_k),
        BlockType("Q6_K", 14, 256, 16, 210, _levels(6, -32), (-128, 127), None, False, _pack_q6_k, _unpack_q6_k),
        BlockType("IQ4_NL", 20, 32, 32, 18, NON_LINEAR, None, None, False,
                  _pack_plain(4, minimum=False), _unpack_plain(4, minimum=False)),
        BlockType("IQ4_XS", 23, 256, 32, 136, NON_LINEAR, (-32, 31), None, False, _pack_iq4_xs, _unpack_iq4_xs),
    )
}  # fmt: skip
"""By ggml's name."""
