"""What vLLM has read of a checkpoint and not yet put into layers."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.formats import possible_places, stored_tensors
from lrcompress.formats.table import Table
from lrcompress.protocols import Spec

WAYS_OUT = "lrcompress export --to dense, which vLLM serves without us"


def without_place(modules: Mapping[str, Spec], experts: Iterable[str]) -> tuple[str, str] | None:
    """A module that vLLM cannot load, and what it is in words; None where it can load all."""
    held = tuple(f"{name}." for name in experts)
    for name, spec in modules.items():
        if spec.format == Table.name:
            return name, "compressed embeddings"
        if spec.conv1d:
            return name, "transposed layers (Conv1D)"
        if spec.bias and held and name.startswith(held):
            return name, "experts with biases, as metric=centred adds them"
    return None


def block_of(name: str) -> str:
    """A module's name up to the number of its block."""
    return re.sub(r"(\.\d+)\..*", r"\1", name)


def holders(names: Iterable[str]) -> set[str]:
    """The modules that hold experts, by the names of tensors."""
    found = (re.match(r"(.*\.experts)\.", name) for name in names)
    return {match[1] for match in found if match is not None}


class Taken:
    """Tensors by module and name, with the manifest's modules under the names that vLLM has for them.

    holders: modules that hold experts, by these names, and what the files call them; renamed: names in the files that
    vLLM must read as others, which transformers calls differently than they do.
    """

    def __init__(self, modules: dict[str, Spec], experts: Iterable[str]) -> None:
        self.modules = modules
        self.holders = {name: name for name in experts}
        self.renamed: dict[re.Pattern[str], str] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def map_names(self, mapped: Callable[[str], str | None]) -> None:
        """As a model of vLLM calls its modules; those that it has none of are left out."""
        found = {name: mapped(name) for name in [*self.modules, *self.holders]}
        specs = {}
        for name, spec in self.modules.items():
            owner = spec.owner and mapped(spec.owner)
            if found[name] is not None:
                specs[str(found[name])] = spec if owner is None else spec.following(owner)
        self.modules = specs
        self.holders = {str(found[name]): raw for name, raw in self.holders.items() if found[name] is not None}

    def rename(self, held: str, prefix: str) -> None:
        """Read what lies beside experts `held`, and they, under vLLM's name for them, where that is another."""
        if held == prefix:
            return
        before, after = held.split("."), prefix.split(".")
        if len(before) != len(after) or [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] != [
            len(before) - 2
        ]:
            raise InputError(f"{held} holds experts, which vLLM looks for in {prefix}: use {WAYS_OUT}")
        raw = self.holders[held].rpartition(".")[0]
        self.renamed[re.compile(rf"^{re.escape(raw)}\.")] = f"{raw.rpartition('.')[0]}.{after[-2]}."
        old, new = f"{'.'.join(before[:-1])}.", f"{'.'.join(after[:-1])}."
        self.modules = {
            name.replace(old, new, 1) if name.startswith(old) else name: spec for name, spec in self.modules.items()
        }

    def rename_projections(self, prefix: str, names: Mapping[str, str]) -> None:
        """Read an expert's projections under other names, and those of all experts in one tensor."""
        head = rf"(?<=\.{re.escape('.'.join(prefix.split('.')[-3:]))}\.)"
        for ours, theirs in names.items():
            self.renamed[re.compile(rf"{head}(\d+)\.{ours}\.")] = rf"\1.{theirs}."
        if names:
            joined = {"gate_up_proj": "w13", "down_proj": names.get("down_proj", "down_proj")}
            for ours, theirs in joined.items():
                self.renamed[re.compile(rf"{head}{ours}$")] = theirs

    def add(self, name: str, key: str, tensor: Tensor) -> None:
        """Keep a copy: vLLM's own is a view of the file."""
        self.tensors.setdefault(name, {})[key] = tensor.clone()

    def place(self, name: str, key: str, owner: str | None) -> Tensor:
        """A tensor of module `name`, or one that it shares with `owner`; InputError where the files lack it."""
        for place in possible_places(key, f"{name}.", f"{owner}."):
            module = name if place.startswith(f"{name}.") else str(owner)
            found = self.tensors.get(module, {}).get(place.removeprefix(f"{module}."))
            if found is not None:
                return found
        raise InputError(f"the checkpoint has no tensor {name}.{key}: it is damaged, get it again")

    def tensors_of(self, name: str, spec: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
        """All that a module stores, what it shares included, but for the empty `weight`."""
        return {
            key: self.place(name, key, spec.owner) for key in stored_tensors(spec.alone(), dtype) if key != "weight"
        }

    def drop(self, names: Iterable[str]) -> None:
        """Forget the tensors of modules that are in their layers, but for those that others share."""
        lent = {spec.owner for spec in self.modules.values()}
        for name in names:
            if name not in lent:
                self.tensors.pop(name, None)
