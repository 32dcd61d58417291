"""What a low-rank correction corrects, one file a base: a weight and its input Gram to a stored format."""

from lrcompress.bases.base import BASES, Base, BaseOptions, Compressed, parse_base

__all__ = ["BASES", "Base", "BaseOptions", "Compressed", "parse_base"]
