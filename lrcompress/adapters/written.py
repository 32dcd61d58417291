"""The squeezed adapter as it is written: components, ranks, dtypes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.checkpoint.writer import copy_files_beside
from lrcompress.errors import InputError
from lrcompress.foreign.adapter import CONFIG, Adapter
from lrcompress.foreign.new_adapter import Shape, lora_tensors, resized_config, write_adapter
from lrcompress.foreign.one_rank import cast, check_twins, level_config, levelled, padded
from lrcompress.formats.low_rank import LowRank
from lrcompress.linalg.truncation import Spectrum
from lrcompress.stages.workspace import write_json


def common_rank(adapter: Adapter, ranks: dict[str, int]) -> int:
    """The rank that all updates are padded to; InputError where what is kept needs a higher one, or its own scaling."""
    common = max(ranks.values())
    apart = next((name for name, (rank, _) in adapter.kept.items() if rank > common), None)
    if apart is not None:
        raise InputError(
            f"the update of {apart} in {adapter.label} is no linear layer's and keeps its rank "
            f"{adapter.kept[apart][0]}, and one rank for all would be no less: pass --per-module-ranks"
        )
    check_twins(adapter.label, adapter.twins)
    return common


@dataclass(frozen=True)
class Written:
    """The squeezed adapter: components per module, the rank that all are padded to (None: each has its own), the dtype
    that was asked for."""

    adapter: Adapter
    ranks: dict[str, int]
    common: int | None
    dtype: torch.dtype | None

    @property
    def config(self) -> dict[str, Any]:
        """Of adapter_config.json."""
        adapter = self.adapter
        if self.common is not None:
            return level_config(adapter.config, self.common)
        return resized_config(adapter.config, self.ranks, adapter.kept, adapter.twins)

    def shape(self, name: str) -> Shape:
        """Of the factors of a module, as they are written."""
        lora, reader = self.adapter.modules[name], self.adapter.reader
        assert lora.shape is not None
        right, left = (self.dtype or reader.meta(key).dtype for key in (lora.right, lora.left))
        return Shape(lora.shape, self.common or self.ranks[name], (right, left), self.adapter.tied.get(name))

    def bytes(self, name: str) -> int:
        """Of the factors of a module, and of their copy where an embedding is tied to it."""
        return sum(meta.numel() * meta.itemsize for _, meta in self.shape(name).tensors(name))

    def other(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that is no factor of a linear layer's update."""
        if self.common is not None:
            tensor = levelled(name, tensor, self.adapter.kept, self.common)
        return cast(tensor, self.dtype)


def write_squeezed(written: Written, spectra: dict[str, Spectrum], folder: Path) -> None:
    adapter = written.adapter
    copy_files_beside(adapter.folder, folder, code=False)
    write_json(folder / CONFIG, written.config)
    shapes = {name: written.shape(name) for name in written.ranks}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in adapter.others:
            yield name, written.other(name, adapter.carried(name))
        for name, shape in shapes.items():
            spectrum, (right, left), rank = spectra[name], shape.dtypes, written.ranks[name]
            stored = LowRank.encode(spectrum.left[:, :rank], spectrum.right[:rank], None)
            factors = padded(stored["A.weight"].to(right), stored["B.weight"].to(left), shape.rank)
            yield from lora_tensors(name, *factors, shape.twin)

    others = {name: written.other(name, adapter.reader.meta(name)) for name in adapter.others}
    write_adapter(folder, others, shapes, tensors())
