"""What can be merged: the linear updates of a LoRA adapter, or the factorised weights of a checkpoint of ours."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrcompress.checkpoint.folder import read_config_file
from lrcompress.checkpoint.manifest import Manifest, read_manifest
from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.foreign.adapter import Adapter, open_adapter
from lrcompress.formats import spec_bytes


@dataclass(frozen=True)
class Task(ABC):
    """One of several models of a base; its matrices are of low rank, by the name of their module."""

    kind: ClassVar[str]
    label: str
    folder: Path

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every matrix."""

    @abstractmethod
    def rank(self, module: str) -> int:
        """Rank of a matrix."""

    @abstractmethod
    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """left (out, r) and right (r, in), float64."""

    @abstractmethod
    def dtypes(self, module: str) -> tuple[torch.dtype, torch.dtype]:
        """Of the stored left and right factor."""

    @abstractmethod
    def bytes(self, module: str) -> int:
        """Stored bytes of a matrix."""

    @property
    @abstractmethod
    def others(self) -> dict[str, Tensor]:
        """Meta tensors of everything else that belongs to the task, by name."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One of the others."""

    @property
    @abstractmethod
    def base(self) -> str:
        """What the task says about its base."""

    @abstractmethod
    def entry(self) -> dict[str, Any]:
        """What has to be known, as JSON, to write the task again."""


@dataclass(frozen=True)
class AdapterTask(Task):
    """A LoRA adapter."""

    kind: ClassVar[str] = "adapter"
    adapter: Adapter

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: lora.shape for name, lora in self.adapter.linear.items() if lora.shape is not None}

    def rank(self, module: str) -> int:
        return self.adapter.modules[module].rank

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        return self.adapter.factors(module)

    def dtypes(self, module: str) -> tuple[torch.dtype, torch.dtype]:
        lora = self.adapter.modules[module]
        return self.adapter.reader.meta(lora.left).dtype, self.adapter.reader.meta(lora.right).dtype

    def bytes(self, module: str) -> int:
        return self.adapter.bytes(module)

    @property
    def others(self) -> dict[str, Tensor]:
        return {name: self.adapter.reader.meta(name) for name in self.adapter.others}

    def tensor(self, name: str) -> Tensor:
        return self.adapter.carried(name)

    @property
    def base(self) -> str:
        return str(self.adapter.config.get("base_model_name_or_path"))

    def entry(self) -> dict[str, Any]:
        adapter = self.adapter
        return {"kind": self.kind, "config": adapter.config, "kept": adapter.kept, "twins": adapter.twins}


@dataclass(frozen=True)
class ModelTask(Task):
    """A checkpoint of ours whose compressed weights are low_rank or pivoted."""

    kind: ClassVar[str] = "model"
    manifest: Manifest
    reader: Multiplied

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: spec.shape for name, spec in self.reader.specs.items()}

    def rank(self, module: str) -> int:
        return self.reader.specs[module].rank

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        return self.reader.factors(module)

    def dtypes(self, module: str) -> tuple[torch.dtype, torch.dtype]:
        dtype = self.reader.meta(f"{module}.weight").dtype
        return dtype, dtype

    def bytes(self, module: str) -> int:
        return spec_bytes(self.reader.specs[module], self.dtypes(module)[0].itemsize)

    @property
    def others(self) -> dict[str, Tensor]:
        factored = {f"{name}.weight" for name in self.reader.specs}
        return {name: self.reader.meta(name) for name in self.reader.names() if name not in factored}

    def tensor(self, name: str) -> Tensor:
        return self.reader.tensor(name).to(self.reader.meta(name).dtype)

    @property
    def base(self) -> str:
        return str(read_config_file(self.folder).get("model_type"))

    def entry(self) -> dict[str, Any]:
        manifest = Manifest(self.manifest.method, self.reader.specs, self.manifest.frozen)
        return {
            "kind": self.kind,
            "config": {**read_config_file(self.folder), "quantization_config": manifest.as_json()},
        }


def open_task(label: str) -> Task:
    """The folder of a LoRA adapter, or of a factorised checkpoint of ours; InputError where it is neither."""
    folder = Path(label).expanduser()
    manifest = read_manifest(folder)
    if manifest is None:
        return AdapterTask(label, folder, open_adapter(label))
    return ModelTask(label, folder, manifest, Multiplied(folder, manifest, label))
