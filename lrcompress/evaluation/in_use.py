"""What a stored format costs in use: bits a weight in memory, and how fast it decodes, measured here once and kept."""

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.checkpoint.cache import note, recall
from lrcompress.checkpoint.manifest import read_manifest, read_weight
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.formats import StoredLinear, restored
from lrcompress.formats.base import DENSE, held
from lrcompress.formats.coded import Coded, Scales
from lrcompress.formats.table import Table
from lrcompress.kernels.native import processor
from lrcompress.protocols import Spec
from lrcompress.report.summary import computing_versions

SCHEMA = 1
"""Of what is kept: one more whenever it is measured otherwise."""
CROWD = 64 * 2**20
"""Bytes of dense weights that are multiplied in turn: more than caches hold, as a model's are."""
SECONDS = 0.2
TURNS = 3


@dataclass(frozen=True)
class InUse:
    """Of a weight (out, in): bits a number that it holds in memory; speed of one row's product, times dense's."""

    format: str
    shape: tuple[int, int]
    bits: float
    speed: float

    def __str__(self) -> str:
        return (
            f"in memory {self.bits:.1f} bits a weight, decoding about {self.speed:.1f} × dense "
            f"({self.format}, {self.shape[0]} × {self.shape[1]}, measured on this processor)"
        )


def stored_in_use(report: dict[str, Any], folder: Path) -> InUse | None:
    """Of the largest weight of the format that most numbers are stored in; None where all is dense."""
    manifest, target = read_manifest(folder), _typical(report["targets"])
    if target is None or manifest is None:
        return None
    spec, reader = manifest.modules[target["name"]], CheckpointReader(folder)
    dtype = reader.meta(f"{target['name']}.weight").dtype
    key = _key(target, dtype)
    known = _recalled(key, target)
    if known is not None:
        return known
    stored = read_weight(reader, target["name"], spec)
    return _noted(key, target, restored(spec.alone(), stored, dtype), dtype)


def planned_in_use(plan: dict[str, Any]) -> InUse | None:
    """The same of a plan: what is known here of such weights, or measured on random codes; else None."""
    target = _typical(plan["targets"])
    if target is None:
        return None
    dtype = getattr(torch, plan["dtype"])
    key = _key(target, dtype)
    known = _recalled(key, target)
    if known is not None or target["format"] != Coded.name:
        return known
    return _noted(key, target, restored(*random_codes(tuple(target["shape"]), key["bits"]), dtype), dtype)


def random_codes(shape: tuple[int, int], bits: float) -> tuple[Spec, dict[str, Tensor]]:
    """A coded weight of Laplacian codes with about so many bits of entropy: log2(2 e scale)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(shape, generator=generator) - 0.5
    sizes = -torch.log1p(-2 * drawn.abs().clamp(max=0.4999999))
    codes = (drawn.sign() * sizes * 2.0**bits / (2 * math.e)).round().int()
    stored = Coded.encode(codes, Scales.nearest(*(torch.ones(n) for n in shape)), None)
    return Spec(Coded.name, shape, parameters={"length": len(stored["stream"])}), stored


def _typical(targets: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    numbers: Counter[str] = Counter()
    for target in targets:
        if target["format"] not in (DENSE, Table.name):
            numbers[target["format"]] += math.prod(target["shape"])
    if not numbers:
        return None
    most = max(numbers, key=numbers.__getitem__)
    return max((t for t in targets if t["format"] == most), key=lambda t: math.prod(t["shape"]))


def _key(target: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    bits = round(2 * 8 * target["bytes"] / math.prod(target["shape"])) / 2
    return {
        "in_use": SCHEMA, "format": target["format"], "bits": bits, "shape": list(target["shape"]),
        "dtype": str(dtype), "threads": torch.get_num_threads(), "processor": processor(),
        "versions": computing_versions(),
    }  # fmt: skip


def _recalled(key: dict[str, Any], target: dict[str, Any]) -> InUse | None:
    value = recall(key)
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(x, float) for x in value):
        return None
    return InUse(target["format"], tuple(target["shape"]), *value)


def _noted(key: dict[str, Any], target: dict[str, Any], layer: StoredLinear, dtype: torch.dtype) -> InUse:
    found = InUse(target["format"], tuple(target["shape"]), *measured(layer, dtype))
    note(key, f"speed of {found.format}, {found.shape[0]} × {found.shape[1]}", [found.bits, found.speed])
    return found


@torch.inference_mode()
def measured(layer: StoredLinear, dtype: torch.dtype) -> tuple[float, float]:
    """Bits a number in memory once it has multiplied, and the speed with one row on the CPU, times dense's."""
    layer.lay_out()
    rows, columns = layer.spec.shape
    dense = torch.randn(rows, columns, dtype=dtype)
    more = min(64, -(-CROWD // held(dense))) - 1
    weights = [dense, *(dense.clone() for _ in range(more))]
    layers = [layer, *(copy.deepcopy(layer) for _ in range(more))]
    x = torch.randn(1, columns, dtype=dtype)
    times: dict[bool, list[float]] = {False: [], True: []}
    end = math.inf
    while len(times[True]) <= TURNS or time.perf_counter() < end:
        for own in (False, True):
            start = time.perf_counter()
            for weight, module in zip(weights, layers, strict=True):
                module(x) if own else nn.functional.linear(x, weight)
            times[own].append(time.perf_counter() - start)
        end = time.perf_counter() + SECONDS if len(times[True]) == 1 else end
    bias = layer.dense_bias()
    size = held(*layer.parameters(), *layer.buffers()) - (0 if bias is None else held(bias))
    slow, fast = (statistics.median(times[own][1:]) for own in (False, True))
    return 8 * size / (rows * columns), slow / fast
