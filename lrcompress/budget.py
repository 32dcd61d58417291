"""What a ratio means: the fraction of the targeted weights' stored bytes that is removed, everything counted."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lrcompress.errors import InputError

MEGABYTE = 10**6


@dataclass(frozen=True)
class Ratio:
    """Bytes of the targets before and after, and the two ratios that a report states.

    `asked` is the ratio the user wanted, None where bytes followed from something else.
    """

    asked: float | None
    targets_dense: int
    targets_stored: int
    checkpoint_dense: int
    checkpoint: int
    numbers_dense: int
    numbers_stored: int

    def as_json(self) -> dict[str, float | None]:
        """The `ratio` object of report.json."""
        return {
            "asked": self.asked,
            "stored": removed(self.targets_stored, self.targets_dense),
            "whole_model": removed(self.checkpoint, self.checkpoint_dense),
            "params": removed(self.numbers_stored, self.numbers_dense),
        }


def check_ratio(ratio: float) -> float:
    """`ratio` itself when it lies in (0, 1)."""
    if not 0.0 < ratio < 1.0:
        raise InputError(f"--ratio {ratio:g} is outside (0, 1): it is the fraction of the targets' bytes to remove")
    return ratio


def removed(stored: int, dense: int) -> float:
    """Fraction removed when `dense` bytes became `stored` bytes."""
    return 1.0 - stored / dense


def kept_bytes(dense_bytes: Iterable[int], ratio: float) -> int:
    """Bytes that may be stored for weights of `dense_bytes` after removing `ratio` of them (rounded down)."""
    return int((1.0 - ratio) * sum(dense_bytes))


def parse_size(text: str) -> int:
    """Bytes of '200MB', '1.5GB', '4096'; MB is 10^6 bytes and MiB is 2^20."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?I?B?)\s*", text, re.IGNORECASE)
    unit = match.group(2).upper() if match else "?"
    if match is None or unit not in units:
        raise InputError(f"size {text!r} is not understood: write it like 200MB or 1.5GB")
    return int(float(match.group(1)) * units[unit])
