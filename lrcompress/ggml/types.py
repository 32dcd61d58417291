"""ggml's block types and their bytes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrcompress.ggml import codebooks, layouts
from lrcompress.ggml.blocks import Blocks, BlockType

__all__ = ["BLOCK_TYPES", "BlockType", "Blocks"]

FLOAT_4 = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
"""What a code of MXFP4 stands for, in scales: twice the numbers of E2M1."""
FLOAT_4_CODES = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)
"""What ggml's blocks hold for each; 8, a zero too, is never written."""

EIGHTHS = (8 / 8, 25 / 8, 43 / 8)
QUARTERS = (4 / 4, 12 / 4, 20 / 4, 28 / 4, 36 / 4, 44 / 4, 52 / 4, 62 / 4)
ODD = (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)
"""Sizes of numbers in IQ2_XXS, IQ2_XS and IQ2_S, in IQ3_XXS, and in IQ3_S, in scales by odd steps."""

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What a code of IQ4_NL and IQ4_XS stands for, in scales."""


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


def _pack_mxfp4(blocks: Blocks) -> Tensor:
    table = torch.tensor(FLOAT_4_CODES, dtype=torch.uint8, device=blocks.codes.device)
    codes = layouts.split_halves(table[blocks.codes.long()], [0, 4], 16)
    return torch.cat([layouts.power_bytes(blocks.scale), codes], 1)


def _unpack_mxfp4(packed: Tensor) -> Blocks:
    places = [FLOAT_4_CODES.index(code if code != 8 else 0) for code in range(16)]
    table = torch.tensor(places, dtype=torch.uint8, device=packed.device)
    codes = table[layouts.join_halves(packed[:, 1:], [0, 4], 16, 15).long()]
    return Blocks(codes, layouts.power_values(packed[:, 0]))


def _pack_vectors(layout: codebooks.Layout, blocks: Blocks) -> Tensor:
    assert blocks.steps is not None
    return torch.cat([layouts.half_bytes(blocks.scale), layout.pack(blocks.codes, (blocks.steps - 1) // 2)], 1)


def _unpack_vectors(layout: codebooks.Layout, packed: Tensor) -> Blocks:
    codes, steps = layout.unpack(packed[:, 2:])
    return Blocks(codes, layouts.half_values(packed[:, :2]), steps=2 * steps + 1)


def _vectors(name: str, number: int, run: int, size: int, magnitudes: tuple[float, ...]) -> BlockType:
    layout = codebooks.LAYOUTS[name]
    levels = tuple(-value for value in reversed(magnitudes)) + magnitudes
    pack, unpack = partial(_pack_vectors, layout), partial(_unpack_vectors, layout)
    return BlockType(
        name, number, 256, run, size, levels, (1, 31), None, False, pack, unpack, stride=2, book=layout.book
    )


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
        BlockType("MXFP4", 39, 32, 32, 17, FLOAT_4, None, None, False, _pack_mxfp4, _unpack_mxfp4, powers=True),
        _vectors("IQ2_XXS", 16, 32, 66, EIGHTHS),
        _vectors("IQ2_XS", 17, 16, 74, EIGHTHS),
        _vectors("IQ3_XXS", 18, 32, 98, QUARTERS),
        _vectors("IQ3_S", 21, 32, 110, ODD),
        _vectors("IQ2_S", 22, 16, 82, EIGHTHS),
    )
}  # fmt: skip
"""By ggml's name."""
