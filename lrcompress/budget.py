"""What a ratio means: the fraction of the targeted weights' stored bytes that is removed, everything counted."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from lrcompress.errors import InputError

MEGABYTE = 10**6

FEW_TARGETS = 0.5
"""Where the targets hold less than this part of a model, a ratio of theirs says little about it."""

Measure = Literal["bytes", "flops", "rank"]
"""What a ratio counts: stored bytes, multiply-adds per token, or the sum of ranks (WeLore's convention)."""


@dataclass(frozen=True)
class Ratio:
    """Bytes of the targets before and after, and the two ratios that a report states.

    `asked` is the ratio the user wanted, None where bytes followed from something else; `of` is what it counts, and
    `counted` the fraction of that which was removed, None where that is the stored bytes.
    """

    asked: float | None
    targets_dense: int
    targets_stored: int
    checkpoint_dense: int
    checkpoint: int
    numbers_dense: int
    numbers_stored: int
    of: Measure = "bytes"
    counted: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The `ratio` object of report.json."""
        stored = removed(self.targets_stored, self.targets_dense)
        return {
            "asked": self.asked,
            "of": self.of,
            "counted": stored if self.counted is None else self.counted,
            "stored": stored,
            "whole_model": removed(self.checkpoint, self.checkpoint_dense),
            "params": removed(self.numbers_stored, self.numbers_dense),
            "bpw": bits_per_weight(self.targets_stored, self.numbers_dense),
        }


def check_ratio(ratio: float) -> float:
    """`ratio` itself when it lies in (0, 1)."""
    if not 0.0 < ratio < 1.0:
        raise InputError(
            f"--ratio {ratio:g} is outside (0, 1): it is the fraction of the targets' bytes to remove, like 0.2 or 20%"
        )
    return ratio


def removed(stored: int, dense: int) -> float:
    """Fraction removed when `dense` bytes became `stored` bytes, the float nearest to it."""
    return (dense - stored) / dense


def bits_per_weight(stored: int, numbers: int) -> float:
    """Bits that `stored` bytes are for each of `numbers` weights."""
    return 8 * stored / numbers


def kept_bytes(dense_bytes: Iterable[int], ratio: float) -> int:
    """Bytes that may be stored for weights of `dense_bytes` after removing `ratio` of them (rounded down)."""
    return int((1 - Fraction(repr(ratio))) * sum(dense_bytes))


SMALLEST = 1000
"""Bytes below which a number without a unit is a forgotten unit: no file of weights is so small."""


def parse_size(text: str) -> int:
    """Bytes of '200MB', '1.5GB', '4096'; MB is 10^6 bytes and MiB is 2^20."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?I?B?)\s*", text, re.IGNORECASE)
    unit = match.group(2).upper() if match else "?"
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or unit not in units or not 0 < number < 2**63:
        raise InputError(f"size {text!r} is not understood: write it like 200MB or 1.5GB")
    if not unit and number < SMALLEST:
        raise InputError(f"size {text!r} is {number:g} bytes: did you mean {number:g}MB?")
    return int(number * units[unit])


def parse_fraction(text: str) -> float:
    """0.2 of '20%' or '0.2', whatever its range."""
    match = re.fullmatch(r"\s*([+-]?[0-9.]+(?:e[+-]?[0-9]+)?)\s*(%?)\s*", text, re.IGNORECASE)
    try:
        number = float(match.group(1)) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise InputError(f"ratio {text!r} is not understood: write it like 0.2 or 20%")
    return number / (100 if match.group(2) else 1)


def parse_percent(text: str) -> float:
    """0.02 of '2%' or '0.02'; at least 1 without a percent sign is refused, for it may well have meant percent."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(%?)\s*", text, re.IGNORECASE)
    try:
        value = float(match.group(1)) / (100 if match.group(2) else 1) if match else 0.0
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise InputError(f"loss {text!r} is not understood: write it like 2% or 0.02, above 0 and below 100%")
    return value
