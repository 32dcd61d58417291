"""What every export shares: the compressed checkpoint and the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrcompress.budget import Ratio
from lrcompress.checkpoint.experts import open_skeleton
from lrcompress.checkpoint.folder import read_config_file
from lrcompress.checkpoint.manifest import Manifest, check_stored, counted, read_manifest, read_weight
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.foreign.opening import is_gguf, open_model
from lrcompress.formats import DENSE, StoredLinear, restored
from lrcompress.model.skeleton import stored_names
from lrcompress.protocols import Site, Spec
from lrcompress.report.summary import load_report


@dataclass
class Source:
    """label: as the user named it; config: config.json as it lies there; report: report.json where there is one."""

    label: str
    folder: Path
    config: dict[str, Any]
    manifest: Manifest
    reader: CheckpointReader
    report: dict[str, Any] | None

    def owner(self, name: str) -> str | None:
        """The compressed module that tensor `name` belongs to, None for a tensor of the dense rest."""
        parts = name.split(".")
        paths = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((path for path in paths if path in self.manifest.modules), None)

    def layer(self, name: str) -> StoredLinear:
        """Compressed module `name` with its tensors, in float32."""
        spec = self.manifest.modules[name]
        return restored(spec, read_weight(self.reader, name, spec), torch.float32)


def open_compressed(checkpoint: str) -> Source:
    """CHECKPOINT, its manifest checked against its tensors; InputError where they differ or it is none of ours."""
    refusal = f"{checkpoint} is not compressed by lrcompress: there is nothing to export; name what compress wrote"
    if is_gguf(checkpoint):
        raise InputError(f"{refusal}, or make a folder of the file with --to dense")
    folder = open_model(checkpoint).folder
    config = read_config_file(folder)
    manifest = read_manifest(folder)
    if manifest is None or not manifest.modules:
        raise InputError(f"{refusal} (transformers and PEFT load a dense folder as it is)")
    source = Source(checkpoint, folder, config, manifest, CheckpointReader(folder), load_report(folder))
    check_stored(manifest, source.reader)
    return source


def open_file(checkpoint: str) -> Source:
    """A GGUF file, or `demo`, as it was converted: a Source of which nothing is compressed."""
    folder = open_model(checkpoint).folder
    return Source(checkpoint, folder, read_config_file(folder), Manifest("gguf", {}), CheckpointReader(folder), None)


def exported_report(
    source: Source, folder: Path, modules: dict[str, Spec], *, trust_remote_code: bool
) -> dict[str, Any] | None:
    """report.json for what lies in `folder`, weights as in `modules` or dense: counted anew from its files.

    What was measured on the compressed model is left out; how that was made stays.
    """
    if source.report is None:
        return None
    _, original = open_skeleton(source.folder, source.manifest.modules, trust_remote_code=trust_remote_code)
    model, reader = open_skeleton(folder, modules, trust_remote_code=trust_remote_code)
    kept = stored_names(model, (name for name in reader.names() if name not in reader.made()))
    called = {stored: name for name, stored in kept.items()}
    files = {called.get(name, name): meta for name, meta in reader.metas().items()}
    originals, sites, targets = set(original.names()), [], []
    for entry in source.report["targets"]:
        name, shape = entry["name"], (int(entry["shape"][0]), int(entry["shape"][1]))
        before = source.manifest.modules.get(name)
        had_bias = before.bias and not before.added_bias if before else f"{name}.bias" in originals
        sites.append(Site(name, shape, 0, name, had_bias))
    found = counted(files, sites)
    for entry, site in zip(source.report["targets"], sites, strict=True):
        name, shape, before = site.name, site.shape, source.manifest.modules.get(site.name)
        spec = modules.get(name, Spec(DENSE, shape))
        size = shape[0] * shape[1] * files[f"{name}.weight"].itemsize
        same = spec.format == DENSE or spec == before  # dense: multiplied out, or never compressed
        targets.append({
            **entry, "format": spec.format, "rank": spec.rank, "bytes": found[name][0],
            "dense_bytes": size, "relative_error": entry["relative_error"] if same else None,
        })  # fmt: skip
    numbers_dense = sum(site.shape[0] * site.shape[1] for site in sites)
    numbers_stored = sum(numbers for _, numbers in found.values())
    dense, stored = sum(t["dense_bytes"] for t in targets), sum(t["bytes"] for t in targets)
    ratio = Ratio(None, dense, stored, reader.bytes - stored + dense, reader.bytes, numbers_dense, numbers_stored)
    made = {key: value for key, value in source.report.items() if key != "evaluation"}
    return {
        **made,
        "exported_from": source.label,
        "ratio": ratio.as_json(),
        "bytes": {"targets_dense": dense, "targets_stored": stored, "checkpoint": reader.bytes},
        "targets": targets,
        "warnings": [],
    }
