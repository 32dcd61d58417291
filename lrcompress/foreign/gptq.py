"""GPTQ checkpoints as bases.

The packing is read here: gptqmodel 7.7 asks for torch 2.14 and more, and the packing is a stream of bits like ours.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.foreign.quantised import Dense, ForeignWeights
from lrcompress.linalg.packing import UNITS, unpack
from lrcompress.model.targets import is_conv1d

LAYOUTS = {"gptq": 1, "gptq_v2": 0}
"""checkpoint_format to what was subtracted from the zero points before packing."""


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """InputError where the config says that the tensors have another layout."""
    bits, group, layout = settings.get("bits"), settings.get("group_size"), _layout(settings)
    if isinstance(bits, bool) or bits not in UNITS:
        raise InputError(f"base {folder} has {bits!r} bits (gptq): {', '.join(map(str, UNITS))} are read")
    if isinstance(group, bool) or not isinstance(group, int) or group == 0 or group < -1:
        raise InputError(
            f"base {folder} has the group_size {group!r} (gptq): a whole number, or -1 for the row, is read"
        )
    if layout not in LAYOUTS:
        raise InputError(f"base {folder} has the checkpoint_format {layout!r} (gptq): {', '.join(LAYOUTS)} are read")


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row of words (rows, n) int32, packed densely from the lowest bit; uint8."""
    packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return unpack(nn.functional.pad(packed, (0, -packed.shape[-1] % UNITS[bits][1])), bits, count)


class Gptq(ForeignWeights):
    """qweight (words, out) and qzeros (groups, words) int32, packed along inputs and outputs; scales (groups, out)."""

    marker: ClassVar[str] = "qweight"
    scale_leaf: ClassVar[str] = "scales"

    def __init__(self, folder: Path, reader: CheckpointReader, dense: Dense, settings: dict[str, Any]) -> None:
        self._bits, self._group, self._less = settings["bits"], settings["group_size"], LAYOUTS[_layout(settings)]
        super().__init__(folder, reader, dense)

    def layout(self, name: str) -> tuple[tuple[int, int], int, int]:
        rows, width = self.module(name).weight.shape  # type: ignore[misc,union-attr]
        if is_conv1d(self.module(name)):
            rows, width = width, rows
        rows, width = int(rows), int(width)  # type: ignore[arg-type]
        group = width if self._group == -1 else self._group
        groups = -(-width // group)
        self.expect(name, "qweight", (-(-width * self._bits // 32), rows), torch.int32)
        self.expect(name, "qzeros", (groups, -(-rows * self._bits // 32)), torch.int32)
        self.expect(name, "scales", (groups, rows))
        self.check_order(name, "g_idx", width, group)
        if self._less and bool((self._stored_zeros(name, rows) == 2**self._bits - 1).any()):
            raise self.refuse(
                name,
                "has zero points that wrapped round when one was subtracted (checkpoint_format gptq), about which "
                "readers disagree: save it as gptq_v2",
            )
        return (rows, width), self._bits, group

    def decode(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        rows, width = self.specs[name].shape
        codes = unpack_words(self.read(name, "qweight").T, self._bits, width)
        zeros = self._stored_zeros(name, rows).T.to(torch.int32) + self._less
        return codes.to(torch.int32), self.read(name, "scales").T, zeros

    def _stored_zeros(self, name: str, rows: int) -> Tensor:
        return unpack_words(self.read(name, "qzeros"), self._bits, rows)


def _layout(settings: dict[str, Any]) -> str:
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
