"""A task of a shared basis as what it was before `merge`: an adapter, or a checkpoint."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.adapters.shared import FILES, SCHEMA, SHARED, combined, load_elements, read_index
from lrcompress.checkpoint.adapter import CONFIG, Shape, lora_tensors, resized_config, write_adapter
from lrcompress.checkpoint.manifest import Manifest
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside
from lrcompress.errors import InputError, nearest
from lrcompress.formats import FORMATS, stored_tensors
from lrcompress.stages.workspace import new_folder, write_json

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module to left (out, r) and right (r, in)."""


def extract(shared: str, task: str, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write one task of a shared basis as what it was: an adapter that PEFT loads, or a checkpoint of ours."""
    folder = Path(shared).expanduser()
    index = read_index(folder, shared)
    if task not in index["tasks"]:
        raise InputError(f"{shared} holds no task {task!r}: {nearest(task, list(index['tasks']))}")
    entry, reader = index["tasks"][task], CheckpointReader(folder, f"{SHARED}.safetensors")
    specs = Manifest.from_json(entry["config"]["quantization_config"]).modules if entry["kind"] == "model" else {}
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
            _write_adapter(entry, factors, reader, partial)
    ranks = [left.shape[1] for left, _ in factors.values()]
    size = sum(left.nbytes + right.nbytes for left, right in factors.values())
    return {
        "schema": SCHEMA, "shared": shared, "task": task, "output": str(output), "modules": len(factors),
        "ranks": [min(ranks), max(ranks)], "bytes": size, "relative_error": entry["relative_error"],
    }  # fmt: skip


def _write_adapter(entry: dict[str, Any], factors: Factors, reader: CheckpointReader, folder: Path) -> None:
    ranks = {module: left.shape[1] for module, (left, _) in factors.items()}
    kept = {module: (int(rank), float(scaling)) for module, (rank, scaling) in entry["kept"].items()}
    twins = {module: (str(twin), float(scaling)) for module, (twin, scaling) in entry.get("twins", {}).items()}
    write_json(folder / CONFIG, resized_config(entry["config"], ranks, kept, twins))
    tied = {module: twin for module, (twin, _) in twins.items()}
    shapes = {
        module: Shape((len(left), right.shape[1]), ranks[module], (right.dtype, left.dtype), tied.get(module))
        for module, (left, right) in factors.items()
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, place in entry["tensors"].items():
            yield name, reader.tensor(place)
        for module, (left, right) in factors.items():
            yield from lora_tensors(module, right, left, tied.get(module))

    write_adapter(folder, {name: reader.meta(place) for name, place in entry["tensors"].items()}, shapes, tensors())


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
