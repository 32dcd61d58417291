"""Quantised checkpoints of other tools as bases: their codes, scales and zero points, repacked into `quantized`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.formats.quantized import Quantized
from lrcompress.model.skeleton import stored_names
from lrcompress.model.targets import is_conv1d
from lrcompress.protocols import Site, Spec


@dataclass(frozen=True)
class Dense:
    """The dense model that a base is compared with: `names` gives every tensor's name in its files."""

    reader: CheckpointReader
    names: Mapping[str, str]
    skeleton: nn.Module
    sites: Sequence[Site]
    model_type: str
    dtype: torch.dtype
    """The one to write in."""


def exact_in(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds the same numbers."""
    return torch.equal(values.to(dtype).to(values.dtype), values)


def refuse_dtype(folder: Path, name: str, values: Tensor, dtype: torch.dtype) -> None:
    """InputError where `dtype` does not hold the numbers of tensor `name` as they are."""
    if not exact_in(values, dtype):
        stored, written = (str(kind).removeprefix("torch.") for kind in (values.dtype, dtype))
        raise InputError(
            f"base {folder} stores {name} as {stored}, which {written} does not hold exactly: "
            f"write with --dtype {stored} or float32"
        )


class ForeignWeights(ABC):
    """The quantised layers of a checkpoint; what cannot be repacked exactly is refused when it is opened."""

    marker: ClassVar[str]
    """Last part of the name of a tensor that every quantised layer has."""
    scale_leaf: ClassVar[str]
    """Last part of the name of its scales."""

    def __init__(self, folder: Path, reader: CheckpointReader, dense: Dense) -> None:
        self.folder, self.reader, self.dense = folder, reader, dense
        self._present = set(reader.names())
        stems = [name.removesuffix(f".{self.marker}") for name in self._present if name.endswith(f".{self.marker}")]
        found = stored_names(dense.skeleton, [f"{stem}.weight" for stem in sorted(stems)])
        self.stems = {name.removesuffix(".weight"): stem.removesuffix(".weight") for name, stem in found.items()}
        unknown = sorted(set(stems) - set(self.stems.values()))
        if unknown:
            raise InputError(
                f"base {folder} compresses {unknown[0]}, which the dense model does not have: name the one that "
                "it was made from"
            )
        self.specs = {name: self._checked(name) for name in self.stems}

    @abstractmethod
    def layout(self, name: str) -> tuple[tuple[int, int], int, int]:
        """Shape (out, in), bits and inputs per group of a layer; InputError where `quantized` cannot hold it."""

    @abstractmethod
    def decode(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in), scale (out, groups) and zeros (out, groups): weight = scale (code - zero)."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """See StoredWeights."""
        codes, scale, zeros = self.decode(name)
        bits = self.specs[name].parameters["bits"]
        if any(int(t.min()) < 0 or int(t.max()) >= 2**bits for t in (codes, zeros)):
            raise self.refuse(name, f"has codes outside of {bits} bits: it is damaged")
        bias = self.read(name, "bias") if self.specs[name].bias else None
        return Quantized.encode(codes, scale, zeros, bits, bias)

    def module(self, name: str) -> nn.Module:
        """The dense layer, on the meta device."""
        return self.dense.skeleton.get_submodule(name)

    def has(self, name: str, leaf: str) -> bool:
        """Whether the files have this tensor of a layer."""
        return f"{self.stems[name]}.{leaf}" in self._present

    def meta(self, name: str, leaf: str) -> Tensor:
        """Its shape and dtype; InputError where it is missing."""
        if not self.has(name, leaf):
            raise self.refuse(name, f"has no tensor {leaf}: the checkpoint is damaged")
        return self.reader.meta(f"{self.stems[name]}.{leaf}")

    def read(self, name: str, leaf: str) -> Tensor:
        """The tensor itself."""
        self.meta(name, leaf)
        return self.reader.tensor(f"{self.stems[name]}.{leaf}")

    def refuse(self, name: str, reason: str) -> InputError:
        """What to raise where a layer cannot be taken over."""
        return InputError(f"base {self.folder}: {self.stems[name]} {reason}")

    def expect(self, name: str, leaf: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
        """InputError where a tensor is of another shape or dtype."""
        meta = self.meta(name, leaf)
        if tuple(meta.shape) != tuple(shape) or dtype not in (None, meta.dtype):
            found = f"{tuple(meta.shape)} of {meta.dtype}"
            raise self.refuse(name, f"has {leaf} {found}, its config says {tuple(shape)}: its layout is not known")

    def check_order(self, name: str, leaf: str, width: int, group: int) -> None:
        """InputError where the groups of a layer, as `leaf` (in,) gives them, are not neighbouring inputs."""
        if not self.has(name, leaf):
            return
        index = self.read(name, leaf)
        if not torch.equal(index.long(), torch.arange(width) // group):
            raise self.refuse(
                name,
                f"has groups of inputs that are no neighbours ({leaf}, act-order), which `quantized` has no place for: "
                "quantise without desc_act",
            )

    def _checked(self, name: str) -> Spec:
        shape, bits, group = self.layout(name)
        module = self.module(name)
        bias = getattr(module, "bias", None) is not None
        for leaf in (self.scale_leaf, *(["bias"] if bias else [])):
            refuse_dtype(self.folder, f"{self.stems[name]}.{leaf}", self.read(name, leaf), self.dense.dtype)
        if not bias and self.has(name, "bias") and bool(self.read(name, "bias").any()):
            raise self.refuse(name, "has a bias, the dense layer has none")
        return Spec("quantized", shape, bias, conv1d=is_conv1d(module), parameters={"bits": bits, "group": group})
