"""Bits of codes and scales in the order in which ggml's blocks hold them (llama.cpp's ggml-common.h)."""

import torch
from torch import Tensor


def split_halves(codes: Tensor, shifts: list[int], run: int) -> Tensor:
    """Bytes (N, size / len(shifts)) of codes (N, size), each byte's parts `run` codes apart.

    Codes go in spans of run * len(shifts): part k of byte i of a span is its code k * run + i.
    """
    spans = codes.to(torch.uint8).reshape(len(codes), -1, len(shifts), run)
    packed = torch.zeros_like(spans[:, :, 0])
    for part, shift in enumerate(shifts):
        packed |= spans[:, :, part] << shift
    return packed.reshape(len(codes), -1)


def join_halves(packed: Tensor, shifts: list[int], run: int, mask: int) -> Tensor:
    """Codes (N, size) of the bytes of `split_halves`."""
    spans = packed.reshape(len(packed), -1, 1, run)
    shift = torch.tensor(shifts, dtype=torch.uint8, device=packed.device)[:, None]
    return ((spans >> shift) & mask).reshape(len(packed), -1)


def pack_bits(bits: Tensor) -> Tensor:
    """Bytes (N, size / 8) of bits (N, size), the first one lowest."""
    weights = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=bits.device)
    return (bits.to(torch.uint8).reshape(len(bits), -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Bits (N, size) of the bytes of `pack_bits`."""
    shift = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shift) & 1).reshape(len(packed), -1)


def pack_six_bit_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """(N, 12) bytes of eight scales and eight minima, each in 0..63 (N, 8): Q4_K and Q5_K."""
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    low = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    middle = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    high = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([low, middle, high], 1)


def unpack_six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima (N, 8) of the bytes of `pack_six_bit_pairs`."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], 1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], 1)
    return scales, minima


def pack_six_bits(scales: Tensor) -> Tensor:
    """(N, 12) bytes of sixteen numbers in 0..63 (N, 16): Q3_K."""
    scales = scales.to(torch.uint8)
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    return torch.cat([low, split_halves(scales >> 4, [0, 2, 4, 6], 4)], 1)


def unpack_six_bits(packed: Tensor) -> Tensor:
    """The numbers (N, 16) of the bytes of `pack_six_bits`."""
    low = join_halves(packed[:, :8], [0, 4], 8, 15)
    return low | (join_halves(packed[:, 8:], [0, 2, 4, 6], 4, 3) << 4)


def half_bytes(values: Tensor) -> Tensor:
    """(N, 2) bytes of values (N,) as float16."""
    return values.to(torch.float16).reshape(-1, 1).view(torch.uint8)


def half_values(packed: Tensor) -> Tensor:
    """Values (N,), float32, of the bytes of `half_bytes`."""
    return packed.contiguous().view(torch.float16).reshape(-1).float()


POWER_BIAS = 128
"""The byte of a scale of 1 in MXFP4."""


def power_bytes(values: Tensor) -> Tensor:
    """(N, 1) bytes of values (N,), powers of two."""
    return (torch.frexp(values).exponent - 1 + POWER_BIAS).to(torch.uint8)[:, None]


def power_values(packed: Tensor) -> Tensor:
    """Values (N,), float32, of the bytes (N,) of `power_bytes`."""
    return torch.ldexp(torch.ones_like(packed, dtype=torch.float32), packed.int() - POWER_BIAS)
