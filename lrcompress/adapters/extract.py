"""A task of a shared basis as what it was before `merge`: an adapter, or a checkpoint."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.adapters.shared import FILES, SCHEMA, SHARED, combined, load_elements, read_index
from lrcompress.checkpoint.manifest import Manifest
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside
from lrcompress.errors import InputError, nearest
from lrcompress.foreign.adapter import CONFIG
from lrcompress.foreign.new_adapter import Shape, lora_tensors, resized_config, write_adapter
from lrcompress.foreign.one_rank import adapter_dtype, cast, check_twins, level_config, levelled, one_rank, padded
from lrcompress.formats import FORMATS, stored_tensors
from lrcompress.stages.workspace import new_folder, write_json

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module to left (out, r) and right (r, in)."""


def extract(
    shared: str,
    task: str,
    output: Path,
    *,
    per_module_ranks: bool = False,
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one task of a shared basis as what it was: an adapter, or a checkpoint of ours.

    All updates of an adapter are padded to one rank, but for `per_module_ranks`.
    """
    folder, wanted = Path(shared).expanduser(), adapter_dtype(dtype)
    index = read_index(folder, shared)
    if task not in index["tasks"]:
        raise InputError(f"{shared} holds no task {task!r}: {nearest(task, list(index['tasks']))}")
    entry, reader = index["tasks"][task], CheckpointReader(folder, f"{SHARED}.safetensors")
    specs = Manifest.from_json(entry["config"]["quantization_config"]).modules if entry["kind"] == "model" else {}
    if specs and (per_module_ranks or wanted is not None):
        raise InputError(f"{task} is a checkpoint, --per-module-ranks and --dtype are for adapters: leave them out")
    factors = {}
    for module, held in index["modules"].items():
        if task in held["tasks"]:
            elements, most = load_elements(reader, module), specs[module].rank if specs else None
            member, (rows, columns) = held["tasks"].index(task), held["shape"]
            empty = torch.zeros(rows, 1), torch.zeros(1, columns)
            factors[module] = combined(elements, member, most) if elements else empty
    with new_folder([folder], output, overwrite=overwrite) as partial:
        if specs:
            copy_files_beside(folder / FILES, partial, code=True)
            _write_model(entry, factors, reader, partial)
        else:
            _write_adapter(entry, factors, reader, partial, wanted, per_module=per_module_ranks)
    ranks = [left.shape[1] for left, _ in factors.values()]
    size = sum(left.nbytes + right.nbytes for left, right in factors.values())
    return {
        "schema": SCHEMA, "shared": shared, "task": task, "output": str(output), "modules": len(factors),
        "ranks": [min(ranks), max(ranks)], "bytes": size, "relative_error": entry["relative_error"],
    }  # fmt: skip


def _write_adapter(
    entry: dict[str, Any],
    factors: Factors,
    reader: CheckpointReader,
    folder: Path,
    dtype: torch.dtype | None,
    *,
    per_module: bool,
) -> None:
    ranks = {module: left.shape[1] for module, (left, _) in factors.items()}
    kept = {module: (int(rank), float(scaling)) for module, (rank, scaling) in entry["kept"].items()}
    twins = {module: (str(twin), float(scaling)) for module, (twin, scaling) in entry.get("twins", {}).items()}
    common = None if per_module else one_rank([*ranks.values(), *(rank for rank, _ in kept.values())])
    if common is None:
        config = resized_config(entry["config"], ranks, kept, twins)
    else:
        check_twins(str(entry["config"].get("base_model_name_or_path")), twins)
        config = level_config(entry["config"], common)
    write_json(folder / CONFIG, config)

    def other(name: str, tensor: Tensor) -> Tensor:
        return cast(tensor if common is None else levelled(name, tensor, kept, common), dtype)

    shapes = {
        module: Shape(
            (len(left), right.shape[1]),
            common or ranks[module],
            (dtype or right.dtype, dtype or left.dtype),
            twins[module][0] if module in twins else None,
        )
        for module, (left, right) in factors.items()
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, place in entry["tensors"].items():
            yield name, other(name, reader.tensor(place))
        for module, (left, right) in factors.items():
            full = padded(cast(right, dtype), cast(left, dtype), shapes[module].rank)
            yield from lora_tensors(module, *full, shapes[module].twin)

    write_adapter(
        folder, {name: other(name, reader.meta(place)) for name, place in entry["tensors"].items()}, shapes, tensors()
    )


def _write_model(entry: dict[str, Any], factors: Factors, reader: CheckpointReader, folder: Path) -> None:
    """Every weight in the format that it had, and of its rank where the basis has as many components."""
    manifest = Manifest.from_json(entry["config"]["quantization_config"])
    specs = {
        module: replace(spec, parameters={**spec.parameters, "rank": factors[module][0].shape[1]})
        for module, spec in manifest.modules.items()
    }
    manifest = replace(manifest, modules=specs)
    write_json(folder / "config.json", {**entry["config"], "quantization_config": manifest.as_json()})
    biases = {f"{module}.bias" for module, spec in specs.items() if spec.bias}
    rest = {name: place for name, place in entry["tensors"].items() if name not in biases}
    planned = [(name, reader.meta(place)) for name, place in rest.items()]
    for module, spec in specs.items():
        stored = stored_tensors(spec, factors[module][0].dtype)
        planned += [(f"{module}.{key}", meta) for key, meta in stored.items()]
    writer = ShardedWriter(folder, planned, 2**63)
    for name, place in rest.items():
        writer.write([(name, reader.tensor(place))])
    for module, spec in specs.items():
        left, right = factors[module]
        bias = None
        if spec.bias:
            bias = reader.tensor(entry["tensors"][f"{module}.bias"]).float()
        encoded = FORMATS.get(spec.format).encode(left.float(), right.float(), bias)  # type: ignore[attr-defined]
        for key, meta in stored_tensors(spec, left.dtype).items():
            writer.write(
                [
                    (
                        f"{module}.{key}",
                        encoded[key].to(meta.dtype) if key in encoded else torch.empty_like(meta, device="cpu"),
                    )
                ]
            )
    writer.close()
