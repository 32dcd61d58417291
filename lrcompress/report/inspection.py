"""What a checkpoint holds: formats, ranks, bytes and singular values, from its files."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrcompress.checkpoint.experts import open_skeleton
from lrcompress.checkpoint.manifest import Manifest, counted, read_manifest, read_weight
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.shards import remark
from lrcompress.foreign.opening import open_model
from lrcompress.formats import restored
from lrcompress.formats.sparse_dictionary import SparseDictionary, product
from lrcompress.model.skeleton import checkpoint_names, find_blocks
from lrcompress.model.targets import find_sites, untouched
from lrcompress.protocols import Site, Spec
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import block_and_kind

SPARKS = "▁▂▃▄▅▆▇█"


def inspect_model(
    model: str, *, spectra: bool = False, trust_remote_code: bool = False, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Every linear layer of the blocks as it is stored, and the parts beside them that are dense.

    With `spectra` also 16 quantiles of every layer's singular values.
    """
    opened = open_model(model)
    said = remark(opened.folder)
    if said is not None and reporter is not None:
        reporter.warn(said)
    manifest = read_manifest(opened.folder) or Manifest("dense", {})
    skeleton, reader = open_skeleton(opened.folder, manifest.modules, trust_remote_code=trust_remote_code)
    named, blocks = sorted(manifest.modules), find_blocks(skeleton)
    sites = find_sites(skeleton, blocks, named, [], tokens=True) if named else []
    inside = [s for s in find_sites(skeleton, blocks, [], []) if s.name not in manifest.modules]
    size, sizes = reader.dtype.itemsize, counted(reader.metas(), sites)
    targets = []
    for site in [*sites, *inside]:
        spec = manifest.modules.get(site.name, Spec("dense", site.shape, site.bias, conv1d=site.conv1d))
        stored = sizes[site.name][0] if site.name in sizes else site.shape[0] * site.shape[1] * size
        targets.append(_entry(site, spec, stored, size))
    if spectra:
        names = {} if manifest.modules else checkpoint_names(skeleton, reader.names())
        for entry, site in zip(targets, [*sites, *inside], strict=True):
            weight = stored_weight(site, manifest.modules.get(site.name), reader, names)
            entry["spectrum"] = quantiles(torch.linalg.svdvals(weight.double()))
    targets.sort(key=lambda entry: _order(entry["name"]))
    return {
        "schema": 1,
        "model": model,
        "method": manifest.method,
        "dtype": str(reader.dtype).removeprefix("torch."),
        "frozen": len(manifest.frozen),
        "bytes": {
            "targets_dense": sum(t["dense_bytes"] for t in targets),
            "targets_stored": sum(t["bytes"] for t in targets),
            "checkpoint": reader.bytes,
        },
        "targets": targets,
        "left_dense": [{"name": n, "parameters": count} for n, count in untouched(skeleton, blocks, named).items()],
    }


def _entry(site: Site, spec: Spec, stored: int, size: int) -> dict[str, Any]:
    dense = site.shape[0] * site.shape[1] * size
    return {
        "name": site.name,
        "format": spec.format,
        "shape": list(site.shape),
        "rank": spec.rank,
        "bytes": stored,
        "dense_bytes": dense,
        "relative_error": None,
        **({"shared": spec.owner} if spec.owner is not None else {}),
        **({"product": product(spec)} if spec.format == SparseDictionary.name else {}),
    }


def stored_weight(site: Site, spec: Spec | None, reader: CheckpointReader, names: dict[str, str]) -> Tensor:
    """The weight (out, in) as the stored tensors give it, float32."""
    if spec is None:
        key = names.get(f"{site.name}.weight", f"{site.name}.weight")
        weight = reader.tensor(key).float()
        return weight.T if site.conv1d else weight
    return restored(spec, read_weight(reader, site.name, spec), torch.float32).dense()


def quantiles(values: Tensor, count: int = 16) -> list[float]:
    """`count` singular values, evenly spaced from the largest to the smallest."""
    index = torch.linspace(0, len(values) - 1, min(count, len(values))).round().long()
    return [float(v) for v in values[index]]


def sparkline(values: Sequence[float], top: float | None = None) -> str:
    """Bars from `top` (the largest value) down to zero; a negative one counts as zero."""
    top = max(values) if top is None else top
    steps = [int(max(value, 0.0) / top * len(SPARKS)) if top > 0 else 0 for value in values]
    return "".join(SPARKS[min(len(SPARKS) - 1, step)] for step in steps)


def removed_by_block(targets: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Kind of weight to the fraction of its bytes that is gone, block by block; only kinds of two blocks and more."""
    sizes: dict[str, dict[int, tuple[int, int]]] = {}
    for target in targets:
        block, kind = block_and_kind(target["name"])
        if block is not None:
            blocks = sizes.setdefault(kind, {})
            stored, dense = blocks.get(block, (0, 0))
            blocks[block] = (stored + target["bytes"], dense + target["dense_bytes"])
    return {
        kind: [1 - stored / dense for _, (stored, dense) in sorted(blocks.items())]
        for kind, blocks in sizes.items()
        if len(blocks) > 1
    }


def _order(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in name.split("."))
