"""What a low-rank correction corrects, one file a base: computed from a weight, or an existing checkpoint."""

from lrcompress.bases.base import BASES, Base, BaseOptions, Compressed, ComputedBase
from lrcompress.bases.existing import Existing, StoredWeights
from lrcompress.bases.spec import is_computed, parse_base

__all__ = [
    "BASES",
    "Base",
    "BaseOptions",
    "Compressed",
    "ComputedBase",
    "Existing",
    "StoredWeights",
    "is_computed",
    "parse_base",
]
