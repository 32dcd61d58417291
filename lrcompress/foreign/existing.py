"""Existing compressed checkpoints as bases: which kinds there are, and that one belongs to the dense model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.bases import StoredWeights
from lrcompress.checkpoint.experts import ExpertReader
from lrcompress.checkpoint.folder import read_config_file
from lrcompress.checkpoint.manifest import QUANT_METHOD, Manifest, read_weight
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.foreign.compressed_tensors import CompressedTensors, read_settings
from lrcompress.foreign.gptq import Gptq, check_settings
from lrcompress.foreign.quantised import Dense, refuse_dtype
from lrcompress.formats import stored_tensors
from lrcompress.formats.sum import Sum
from lrcompress.model.skeleton import stored_names, tied_names
from lrcompress.protocols import Site, Spec


@dataclass(frozen=True)
class OwnWeights:
    """Those of a checkpoint of ours. What weights share there, each stores for itself under its correction."""

    reader: CheckpointReader
    stored: Mapping[str, Spec]

    @property
    def specs(self) -> Mapping[str, Spec]:
        """See StoredWeights."""
        return {name: spec.alone() for name, spec in self.stored.items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """See StoredWeights."""
        found = read_weight(self.reader, name, self.stored[name])
        return {key: tensor for key, tensor in found.items() if key != "weight"}


def check_existing(folder: Path) -> None:
    """InputError where the folder's config says that it cannot be a base; reads nothing else."""
    settings, kind = _settings(folder, read_config_file(folder))
    if kind == QUANT_METHOD:
        _check_manifest(folder, settings)
    else:
        _opener(folder, settings, kind)


def open_existing(folder: Path, dense: Dense) -> StoredWeights:
    """The compressed weights of a folder, each known to fit its site; InputError at the first that does not.

    Everything that the base did not compress must be the dense model's, up to the dtype.
    """
    config = read_config_file(folder)
    settings, kind = _settings(folder, config)
    if config.get("model_type") != dense.model_type:
        raise InputError(
            f"base {folder} is a {config.get('model_type')}, the dense model a {dense.model_type}: "
            "give the dense checkpoint that it was made from"
        )
    reader = CheckpointReader(folder)
    if kind == QUANT_METHOD:
        stored = _check_manifest(folder, settings).modules
        weights: StoredWeights = OwnWeights(reader, stored)
    else:
        stored = {}
        weights = _opener(folder, settings, kind)(reader, dense)
    if not weights.specs:
        raise InputError(f"base {folder} compresses no weight: give a compressed checkpoint")
    sites = {site.name: site for site in dense.sites}
    for name, spec in weights.specs.items():
        _check_site(folder, name, spec, sites.get(name), dense)
        if name in stored:
            _check_stored(folder, name, stored[name], reader, dense)
    _check_rest(folder, ExpertReader(folder, dense.skeleton, weights.specs), weights.specs, dense)
    return weights


def _settings(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The quantization_config and its quant_method; InputError where there is none."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(found, dict):
        raise InputError(f"base {folder} is a dense checkpoint: give a compressed one, or a SPEC such as rtn:4:64")
    return found, str(found.get("quant_method"))


def _check_manifest(folder: Path, settings: dict[str, Any]) -> Manifest:
    manifest = Manifest.from_json(settings)
    for name, spec in manifest.modules.items():
        if spec.format == Sum.name:
            raise InputError(
                f"base {folder} is a base with a correction already (format sum at {name}): "
                "correct its own base with a larger --rank or a smaller --ratio"
            )
    return manifest


Opener = Callable[[CheckpointReader, Dense], StoredWeights]


def _opener(folder: Path, settings: dict[str, Any], kind: str) -> Opener:
    """What opens a checkpoint of another tool; InputError where its config says that it cannot be read."""
    if kind == "compressed-tensors":
        parsed = read_settings(folder, settings)
        return lambda reader, dense: CompressedTensors(folder, reader, dense, parsed)
    if kind == "gptq":
        check_settings(folder, settings)
        return lambda reader, dense: Gptq(folder, reader, dense, settings)
    raise InputError(
        f"base {folder} is of the kind {kind!r}, which cannot be read: {QUANT_METHOD}, compressed-tensors and gptq can"
    )


def _check_site(folder: Path, name: str, spec: Spec, site: Site | None, dense: Dense) -> None:
    if site is None:
        if f"{name}.weight" in dense.skeleton.state_dict():
            raise InputError(
                f"base {folder} compresses {name}, which is no target here: let --target and --ignore include it"
            )
        raise InputError(f"base {folder} compresses {name}, which the dense model does not have")
    if (spec.shape, spec.conv1d) != (site.shape, site.conv1d):
        raise InputError(f"base {folder} stores {name} as {spec.shape}, the dense model as {site.shape}")
    if (spec.bias and not spec.added_bias) != site.bias:
        raise InputError(f"base {folder} and the dense model differ in whether {name} has a bias")


def _check_stored(folder: Path, name: str, spec: Spec, reader: CheckpointReader, dense: Dense) -> None:
    """The files hold what the manifest says, in numbers that the written dtype holds."""
    present = set(reader.names())
    for key, meta in stored_tensors(spec, reader.dtype).items():
        full = f"{name}.{key}"
        if full not in present:
            raise InputError(
                f"base {folder} has no tensor {full}: its config and its files differ, download them again"
            )
        stored = reader.meta(full)
        if stored.shape != meta.shape or stored.is_floating_point() != meta.is_floating_point():
            raise InputError(
                f"base {folder} stores {full} as {tuple(stored.shape)}, its config says {tuple(meta.shape)}: "
                "download it again"
            )
        if stored.is_floating_point() and torch.promote_types(stored.dtype, dense.dtype) != dense.dtype:
            for _, tensor in reader.read([full]):
                refuse_dtype(folder, full, tensor, dense.dtype)


def _check_rest(folder: Path, reader: CheckpointReader, compressed: Mapping[str, Spec], dense: Dense) -> None:
    own, tied = stored_names(dense.skeleton, reader.names()), tied_names(dense.skeleton)
    for name, source in dense.names.items():
        if name.rpartition(".")[0] in compressed:
            continue
        held = next((own[key] for key in (name, *tied.get(name, ())) if key in own), None)
        if held is None:
            raise InputError(
                f"base {folder} has no tensor {name}: it belongs to another model, name the one that it was made from"
            )
        first, second = (r.tensor(key) for r, key in ((dense.reader, source), (reader, held)))
        if first.shape != second.shape:
            raise InputError(
                f"base {folder} stores {name} as {tuple(second.shape)}, the dense model as {tuple(first.shape)}"
            )
        if not (torch.equal(first.to(second.dtype), second) or torch.equal(second.to(first.dtype), first)):
            raise InputError(
                f"base {folder} and the dense model differ in {name}, which the base did not compress: "
                "give the dense checkpoint that it was made from"
            )
