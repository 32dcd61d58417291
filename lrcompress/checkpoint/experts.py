"""Fused experts on disk, read expert by expert however the checkpoint lays them out."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.checkpoint.converted import ConvertedReader
from lrcompress.checkpoint.folder import read_sound_config
from lrcompress.errors import InputError
from lrcompress.model.experts import LinearExperts, experts_of, linear_experts, linearise
from lrcompress.model.skeleton import MISFIT, Renaming, empty_model


def open_skeleton(
    folder: Path, compressed: Iterable[str] = (), *, trust_remote_code: bool = False
) -> tuple[nn.Module, "ExpertReader"]:
    """The model of a folder on the meta device, its experts as linear layers, and its tensors under these names."""
    config = read_sound_config(folder, trust_remote_code=trust_remote_code)
    skeleton = empty_model(config, trust_remote_code=trust_remote_code)
    linearise(skeleton)
    return skeleton, ExpertReader(folder, skeleton, compressed)


@dataclass
class Fused:
    """A fused parameter and the stored tensors that make it: by pattern one per expert, or one for all experts."""

    experts: str
    parameter: str
    sources: dict[str, list[str]]
    converter: Any = None

    @property
    def whole(self) -> bool:
        """Whether one stored tensor holds all experts."""
        return all(len(names) == 1 for names in self.sources.values())


class _OneExpert(nn.Module):
    """What a conversion asks for the shape that its result must have, of which one expert's slice is made."""

    def __init__(self, slice_of: Tensor) -> None:
        super().__init__()
        self._slice = nn.Parameter(slice_of)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The slice, whatever is asked for."""
        return self._slice


class ExpertReader(ConvertedReader):
    """A folder whose fused experts are read under the names that they have as linear layers in `model`.

    transformers' own conversions are applied, to one expert at a time. The fused parameters can be read too. Modules
    that hold one of `compressed` lie on disk as linear layers already.
    """

    def __init__(self, folder: Path, model: nn.Module, compressed: Iterable[str] = ()) -> None:
        super().__init__(folder, model)
        self._model = model
        modules = linear_experts(model)
        stored = {experts_of(name, modules) for name in compressed}
        self._modules = {name: module for name, module in modules.items() if name not in stored}
        self._fused: dict[str, Fused] = {}
        self._parts: dict[str, tuple[str, int]] = {}
        """Name of an expert's tensor to its fused parameter and the expert's number."""
        self._shapes: dict[str, Tensor] = {}
        if self._modules:
            self._find()

    def names(self) -> list[str]:
        """Names of all tensors, sorted: experts' as those of linear layers."""
        used = {name for fused in self._fused.values() for names in fused.sources.values() for name in names}
        return sorted([name for name in super().names() if name not in used] + list(self._parts))

    def meta(self, name: str) -> Tensor:
        """As CheckpointReader.meta, for an expert's tensor or a whole fused parameter too."""
        return self._shapes[name] if name in self._shapes else super().meta(name)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """As CheckpointReader.read, for experts' tensors and whole fused parameters too."""
        yield from super().read([name for name in names if name not in self._shapes])
        wanted: dict[tuple[str, int], list[str]] = {}
        for name in names:
            if name in self._fused:
                yield name, self._whole(name)
            elif name in self._parts:
                wanted.setdefault(self._parts[name], []).append(name)
        for (key, index), parts in wanted.items():
            fused = self._fused[key]
            stem = f"{fused.experts}.{index}."
            found = self._modules[fused.experts].split(fused.parameter, self._slice(fused, index))
            for name in parts:
                yield name, found[name.removeprefix(stem)]

    def will_read(self, names: Sequence[str]) -> None:
        """As CheckpointReader.will_read."""
        fused = {self._parts[name][0] for name in names if name in self._parts} | {n for n in names if n in self._fused}
        stored = [source for name in fused for sources in self._fused[name].sources.values() for source in sources]
        super().will_read([*(name for name in names if name not in self._shapes), *stored])

    def _find(self) -> None:
        renaming = Renaming(self._model)
        targets = {f"{n}.{p}": (n, p) for n, module in self._modules.items() for p in module.fused_shapes()}
        for stored in renaming.in_order(super().names()):
            name, pattern = renaming(stored, targets)
            if name in targets:
                fused = self._fused.setdefault(name, Fused(*targets[name], {}))
                fused.sources.setdefault(pattern or stored, []).append(stored)
                fused.converter = renaming.converter(pattern)
        for name, fused in self._fused.items():
            module = self._modules[fused.experts]
            shape, dtype = (
                module.fused_shapes()[fused.parameter],
                super().meta(next(iter(fused.sources.values()))[0]).dtype,
            )
            self._check(name, fused, module)
            self._shapes[name] = torch.empty(shape, dtype=dtype, device="meta")
            for key, part in module.split(fused.parameter, self._shapes[name][0]).items():
                for index in range(module.count):
                    self._shapes[f"{fused.experts}.{index}.{key}"] = part
                    self._parts[f"{fused.experts}.{index}.{key}"] = (name, index)

    def _check(self, name: str, fused: Fused, module: LinearExperts) -> None:
        """InputError where the stored tensors are not one per expert, or make another shape."""
        counts = {len(names) for names in fused.sources.values()}
        if fused.whole:
            counts = {super(ExpertReader, self).meta(names[0]).shape[0] for names in fused.sources.values()}
        metas = {pattern: super(ExpertReader, self).meta(names[0]) for pattern, names in fused.sources.items()}
        found = None
        if counts == {module.count}:
            found = self._convert(fused, {p: m[:1] if fused.whole else m for p, m in metas.items()}).shape
        if found != module.fused_shapes()[fused.parameter][1:]:
            raise InputError(
                f"{name} cannot be made from {len(next(iter(fused.sources.values())))} tensors like "
                f"{next(iter(fused.sources.values()))[0]}: {MISFIT}"
            )

    def _slice(self, fused: Fused, index: int) -> Tensor:
        """The slice of expert `index`."""
        if fused.whole:
            slices = {p: self.read_slice(names[0], index) for p, names in fused.sources.items()}
        else:
            stored = {names[index]: pattern for pattern, names in fused.sources.items()}
            slices = {stored[name]: tensor for name, tensor in super().read(list(stored))}
        return self._convert(fused, slices)

    def _convert(self, fused: Fused, slices: dict[str, Tensor]) -> Tensor:
        """One expert's slice of the fused parameter from its stored tensors by pattern."""
        if fused.converter is None:
            return next(iter(slices.values()))[0]
        converter, name = copy.deepcopy(fused.converter), f"{fused.experts}.{fused.parameter}"
        for pattern, piece in slices.items():
            converter.add_tensor(name, name, pattern, piece)
        shape = self._modules[fused.experts].fused_shapes()[fused.parameter]
        model = _OneExpert(torch.empty((1, *shape[1:]), device="meta"))
        made: dict[str, Any] = converter.convert(name, model=model, config=self._model.config)
        result = made[name]
        whole: Tensor = result[0] if isinstance(result, list) else result
        return whole[0]

    def _whole(self, name: str) -> Tensor:
        """All experts' slices, one above the other."""
        fused, meta = self._fused[name], self._shapes[name]
        tensor = torch.empty(meta.shape, dtype=meta.dtype)
        for index in range(len(tensor)):
            tensor[index] = self._slice(fused, index)
        return tensor
