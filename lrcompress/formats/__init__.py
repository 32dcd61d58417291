"""Stored formats, one file each: the tensors, their bytes, dense(), how it multiplies."""

from lrcompress.formats.base import (
    DENSE,
    FORMATS,
    FactorPair,
    StoredLinear,
    build,
    index_dtype,
    possible_places,
    restored,
    spec_bytes,
    spec_multiplies,
    spec_numbers,
    stored_tensors,
)

__all__ = [
    "DENSE",
    "FORMATS",
    "FactorPair",
    "StoredLinear",
    "build",
    "index_dtype",
    "possible_places",
    "restored",
    "spec_bytes",
    "spec_multiplies",
    "spec_numbers",
    "stored_tensors",
]
