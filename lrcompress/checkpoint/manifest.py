"""What config.json says about a compressed checkpoint, and what its files say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.checkpoint.folder import read_config_file
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.formats import DENSE, FORMATS, possible_places, stored_tensors
from lrcompress.formats.table import Table
from lrcompress.protocols import Site, Spec

QUANT_METHOD = "lrcompress"
FORMAT_VERSION = 1


@dataclass
class Manifest:
    """modules: spec per compressed weight; frozen: weights left dense that healing must not train.

    experts: modules whose fused experts are linear layers here, with the fused weights that an empty tensor stands for.
    tied: output heads that multiply by a table of embeddings, and store nothing, with the module of the table.
    """

    method: str
    modules: dict[str, Spec]
    frozen: list[str] = field(default_factory=list)
    experts: dict[str, list[str]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "modules": {name: spec.as_json() for name, spec in self.modules.items()},
            "frozen": self.frozen,
            **({"experts": self.experts} if self.experts else {}),
            **({"tied": self.tied} if self.tied else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Manifest":
        """Read and check a `quantization_config`; InputError where it is malformed or newer than this version."""
        if data.get("quant_method") != QUANT_METHOD:
            raise InputError(f"quantization_config has quant_method {data.get('quant_method')!r}, not {QUANT_METHOD!r}")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"checkpoint has format version {version}, this lrcompress reads {FORMAT_VERSION}: upgrade it"
            )
        modules, frozen, experts = data.get("modules"), data.get("frozen", []), data.get("experts", {})
        if not (isinstance(modules, dict) and isinstance(frozen, list) and _is_experts(experts)):
            raise InputError("quantization_config of the checkpoint lists no modules: its config.json is damaged")
        specs = {name: Spec.from_json(name, entry) for name, entry in modules.items()}
        for name, spec in specs.items():
            FORMATS.get(spec.format).check(spec)
            _check_owner(name, spec.owner, specs)
        tied = data.get("tied", {})
        if not isinstance(tied, dict) or any(
            not isinstance(owner, str) or owner not in specs or specs[owner].format != Table.name or head in specs
            for head, owner in tied.items()
        ):
            raise InputError("the manifest ties output heads to what is no table of embeddings: write it again")
        return cls(str(data.get("method", "")), specs, [str(name) for name in frozen], experts, tied)


def _is_experts(data: object) -> bool:
    return isinstance(data, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in data.values()
    )


def _check_owner(name: str, owner: object, specs: dict[str, Spec]) -> None:
    if owner is None or (isinstance(owner, str) and owner in specs and specs[owner].owner is None):
        return
    raise InputError(f"the manifest says that {name} shares with {owner!r}, which stores nothing to share")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where it holds no checkpoint of ours."""
    if not (folder / "config.json").is_file():
        return None
    data = read_config_file(folder).get("quantization_config")
    return Manifest.from_json(data) if isinstance(data, dict) and data.get("quant_method") == QUANT_METHOD else None


def read_weight(reader: CheckpointReader, name: str, spec: Spec) -> dict[str, Tensor]:
    """Stored tensors of weight `name` by their names in it, those that another module stores for both among them."""
    present = set(reader.names())
    places = {}
    for key in stored_tensors(spec.alone(), torch.float32):
        possible = possible_places(key, f"{name}.", f"{spec.owner}.")
        place = next((place for place in possible if place in present), None)
        if place is None:
            raise InputError(f"{reader.folder} has no tensor {possible[0]}: the checkpoint is damaged, get it again")
        places[place] = key
    return {places[place]: tensor for place, tensor in reader.read(list(places))}


def check_stored(manifest: Manifest, reader: CheckpointReader) -> None:
    """InputError where the files lack a tensor that the manifest names, or hold another kind of tensor."""
    stored = {name: reader.meta(name) for name in reader.names()}
    for name, spec in manifest.modules.items():
        for key, meta in stored_tensors(spec, torch.float32).items():
            found = stored.get(f"{name}.{key}")
            if found is None or found.shape != meta.shape or found.is_floating_point() != meta.is_floating_point():
                raise InputError(
                    f"{reader.folder} has no tensor {name}.{key} of shape {tuple(meta.shape)}, as its manifest says: "
                    "the checkpoint is damaged, get it again"
                )


def counted(files: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
    """Bytes and numbers that `files`, meta tensors by the model's names, hold for every site's weight.

    That is all its tensors but a bias of the dense layer.
    """
    stored: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for name, meta in files.items():
        parts = name.split(".")
        owner = next((o for i in range(1, len(parts)) if (o := ".".join(parts[:i])) in stored), None)
        if owner is not None:
            stored[owner].append(meta)
    return {site.name: _count(site, stored[site.name]) for site in sites}


def _count(site: Site, stored: Sequence[Tensor]) -> tuple[int, int]:
    if not stored:
        raise ValueError(f"the files have no tensor of {site.name}")
    total = sum(t.numel() * t.itemsize for t in stored)
    numbers = sum(t.numel() for t in stored)
    if site.bias:
        size = next(t.itemsize for t in stored if t.is_floating_point())
        total, numbers = total - site.shape[0] * size, numbers - site.shape[0]
    return total, numbers


def make_manifest(
    method: str, sites: Sequence[Site], specs: dict[str, Spec], experts: dict[str, list[str]], *, freeze_dense: bool
) -> Manifest:
    """The manifest of a finished plan; experts as there."""
    modules = {site.name: specs[site.name] for site in sites if specs[site.name].format != DENSE}
    frozen = [site.name for site in sites if site.name not in modules] if freeze_dense else []
    tied = {site.head: site.name for site in sites if site.lookup and site.head is not None and site.name in modules}
    return Manifest(method, modules, frozen, experts, tied)
