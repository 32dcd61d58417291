"""Bytes of ggml's block types, against gguf's own dequantisers and, where there are any, quantisers."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from lrcompress.ggml.codebooks import Codebook
from lrcompress.ggml.types import BLOCK_TYPES, Blocks, BlockType

BOTH_WAYS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def random_blocks(kind: BlockType, count: int) -> Blocks:
    """Every part drawn over its whole range."""
    draw = torch.Generator().manual_seed(0)
    runs = kind.block // kind.run

    def whole(ends: tuple[int, int] | None, stride: int = 1) -> torch.Tensor | None:
        if ends is None:
            return None
        return ends[0] + stride * torch.randint((ends[1] - ends[0]) // stride + 1, (count, runs), generator=draw)

    def half() -> torch.Tensor:
        return torch.randn(count, generator=draw).half().float()

    codes = torch.randint(len(kind.levels), (count, kind.block), generator=draw)
    if kind.book is not None:
        codes = from_book(kind.book(), codes)
    powers = torch.ldexp(torch.ones(count), torch.randint(-128, 128, (count,), generator=draw))
    return Blocks(
        codes,
        powers if kind.powers else half(),
        half() if kind.has_minimum else None,
        whole(kind.steps, kind.stride),
        whole(kind.offsets),
    )


def from_book(book: Codebook, codes: torch.Tensor) -> torch.Tensor:
    """Codes of entries and signs that a block can hold, chosen by what was drawn."""
    shape = codes.shape
    entries = book.entries[codes.reshape(-1, book.width).long().square().sum(1) * 7919 % len(book.entries)]
    negative = (codes < book.base).reshape(-1, 8)
    if book.even:
        negative[:, 7] = negative[:, :7].sum(1) % 2 == 1
    places, negative = entries.reshape(shape), negative.reshape(shape)
    return torch.where(negative, book.base - 1 - places, book.base + places)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_numbers_and_sizes_are_llama_cpps(name: str) -> None:
    kind = BLOCK_TYPES[name]
    blocks = random_blocks(kind, 50)
    packed = kind.pack(blocks)
    assert (kind.block, kind.size) == gguf.GGML_QUANT_SIZES[kind_of(name)]
    assert kind.number == kind_of(name).value
    assert packed.shape == (50, kind.size)
    np.testing.assert_array_equal(kind.numbers(blocks).numpy(), dequantize(packed.numpy(), kind_of(name)))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_unpacking_gives_back_what_was_packed(name: str) -> None:
    kind = BLOCK_TYPES[name]
    blocks = random_blocks(kind, 50)
    found = kind.unpack(kind.pack(blocks))
    for part in ("codes", "scale", "minimum", "steps", "offsets"):
        before, after = getattr(blocks, part), getattr(found, part)
        assert (before is None) == (after is None), part
        assert before is None or torch.equal(before.double(), after.double()), part


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bytes_of_gguf_are_read_and_written_again(name: str) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    packed = torch.from_numpy(quantize(weight, kind_of(name)))
    kind = BLOCK_TYPES[name]
    np.testing.assert_array_equal(kind.dense(packed).numpy(), dequantize(packed.numpy(), kind_of(name)))
    blocks = packed.reshape(-1, kind.size)
    assert torch.equal(kind.pack(kind.unpack(blocks)), blocks)
