"""Integer codes of quantised weights in as few bytes as their entropy asks for."""

from lrcompress.coding.stream import coded_bytes, decode, encode, energies, estimated_bits

__all__ = ["coded_bytes", "decode", "encode", "energies", "estimated_bits"]
