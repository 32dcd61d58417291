"""How many bytes for which weight, one file an allocator."""

from lrcompress.allocators.base import ALLOCATORS

__all__ = ["ALLOCATORS"]
