"""Small whole numbers in few bits: codes packed into bytes along the last dimension."""

import torch
from torch import Tensor

UNITS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
"""Per number of bits: how many codes lie in how many bytes, the first code in the lowest bits."""


def packed_length(codes: int, bits: int) -> int:
    """Bytes of a row of `codes` codes; a last unit that is not full is padded."""
    per_unit, unit_bytes = UNITS[bits]
    return -(-codes // per_unit) * unit_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (..., n) of whole numbers below 2^bits to bytes (..., packed_length(n, bits)), uint8."""
    per_unit, unit_bytes = UNITS[bits]
    padding = -codes.shape[-1] % per_unit
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, padding)).unflatten(-1, (-1, per_unit))
    shifts = bits * torch.arange(per_unit, dtype=torch.int32, device=codes.device)
    words = (padded << shifts).sum(-1, dtype=torch.int32)
    places = 8 * torch.arange(unit_bytes, dtype=torch.int32, device=codes.device)
    return ((words[..., None] >> places) & 255).flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row of packed (..., bytes), uint8; inverse of `pack`."""
    if bits == 8:
        return packed[..., :count]
    per_unit, unit_bytes = UNITS[bits]
    shifts = bits * torch.arange(per_unit, dtype=torch.int32, device=packed.device)
    if unit_bytes == 1:
        words = packed[..., None]
        shifts = shifts.to(torch.uint8)
    else:
        places = 8 * torch.arange(unit_bytes, dtype=torch.int32, device=packed.device)
        units = packed.to(torch.int32).unflatten(-1, (-1, unit_bytes))
        words = (units << places).sum(-1, keepdim=True, dtype=torch.int32)
    codes = (words >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def pack_bits(mask: Tensor) -> Tensor:
    """(ceil(numel / 8),) uint8: the bool mask in row-major order, the first bit lowest; the last byte is filled up."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, rows: int, columns: int, first: int = 0) -> Tensor:
    """(rows, columns) bool, from row `first` on of what `pack_bits` packed, whose rows have as many columns."""
    start, stop = first * columns, (first + rows) * columns
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    bits = (packed[start // 8 : -(-stop // 8), None] & weights) > 0
    return bits.flatten()[start % 8 :][: stop - start].reshape(rows, columns)
