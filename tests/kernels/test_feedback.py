"""Compiled rounding with feedback against that of torch, on numbers that float32 adds up exactly."""

import pytest
import torch

from lrcompress.kernels import feedback
from lrcompress.kernels.feedback import NativeTiles, tiles_for
from lrcompress.linalg.two_sided import Tiles, round_two_sided


def exact(shape: tuple[int, ...], unit: float, largest: float, generator: torch.Generator) -> torch.Tensor:
    """Multiples of `unit`."""
    high = int(largest / unit)
    return torch.randint(-high, high + 1, shape, generator=generator) * unit


def sparse_unit_upper(size: int, generator: torch.Generator) -> torch.Tensor:
    few = torch.rand(size, size, generator=generator) < 2 / size
    return (exact((size, size), 0.25, 0.5, generator) * few).triu(1) + torch.eye(size)


@pytest.mark.skipif(tiles_for(torch.zeros(1)) is Tiles, reason="no C compiler")
@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (130, 7), (128, 256), (300, 200)])
def test_both_ways_give_the_same_codes(shape):
    generator = torch.Generator().manual_seed(shape[0])
    target, cut = exact(shape, 0.125, 4, generator), 0.5 - exact(shape, 0.0625, 0.125, generator).abs()
    left, right = (sparse_unit_upper(size, generator) for size in shape)
    native = round_two_sided(target, left, right, cut, NativeTiles)
    assert torch.equal(native, round_two_sided(target, left, right, cut))
    assert torch.equal(native.double(), round_two_sided(*(part.double() for part in (target, left, right, cut))))
    if target.numel() > 1:
        assert not torch.equal(native, target.round())


def test_other_numbers_and_machines_without_a_compiler_take_torch(monkeypatch):
    assert tiles_for(torch.zeros(1, dtype=torch.float64)) is Tiles
    assert tiles_for(torch.zeros(1, device="meta")) is Tiles
    monkeypatch.setattr(feedback, "library", lambda name: None)
    assert tiles_for(torch.zeros(1)) is Tiles
