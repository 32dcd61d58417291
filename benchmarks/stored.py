"""Random weights in every stored format, for benchmarks: how fast they multiply does not depend on what they hold."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.coding import estimated_bits
from lrcompress.formats import StoredLinear, build, spec_bytes, stored_tensors
from lrcompress.formats.coded import Coded, Scales
from lrcompress.linalg.packing import pack, pack_bits
from lrcompress.protocols import Spec

REMOVED = 0.5
"""Of the 16-bit bytes, by formats that have a rank."""


def quantized(bits: int, group: int) -> dict[str, Any]:
    return {"bits": bits, "group": group}


def corrected(bits: int, group: int, rank: int, factor_bits: int) -> dict[str, Any]:
    base = {"format": "quantized", **quantized(bits, group)}
    return {"base": base, "correction": {"format": "low_rank", "rank": rank, "bits": factor_bits}}


FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "quantized 4:32": ("quantized", quantized(4, 32)),
    "quantized 4:64": ("quantized", quantized(4, 64)),
    "quantized 4:128": ("quantized", quantized(4, 128)),
    "quantized 3:64": ("quantized", quantized(3, 64)),
    "quantized 2:64": ("quantized", quantized(2, 64)),
    "quantized 8:128": ("quantized", quantized(8, 128)),
    "sum 4:64 + 32": ("sum", corrected(4, 64, 32, 16)),
    "sum 3:64 + 32 in 8 bits": ("sum", corrected(3, 64, 32, 8)),
    "semi_sparse": ("semi_sparse", {"pattern": "2:4"}),
    "sparse_dictionary": ("sparse_dictionary", {}),
    "transposed_dictionary": ("transposed_dictionary", {}),
    "low_rank": ("low_rank", {}),
    "pivoted": ("pivoted", {}),
    "coded 3.1 bits": ("coded", {"bits": 3.1}),
    "coded 7 bits": ("coded", {"bits": 7.0}),
}
"""Name to format and parameters; those without remove REMOVED."""


def spec_of(name: str, shape: tuple[int, int], removed: float = REMOVED) -> Spec:
    """The spec of a weight; `name` of FORMATS, or a format alone."""
    form, parameters = FORMATS.get(name, (name, {}))
    if form == "coded":
        return coded(shape, _bits(parameters, removed))[0]
    if form == "sum":
        correction: dict[str, Any] = dict(parameters["correction"])
        parameters = {**parameters, "correction": {**correction, "rank": min(correction["rank"], *shape)}}
    return Spec(form, shape, parameters=parameters) if parameters else largest_spec(form, shape, removed)


def largest_spec(name: str, shape: tuple[int, int], removed: float) -> Spec:
    """The spec of the largest rank that removes at least this fraction of the 16-bit bytes.

    Of dictionaries every output has coefficients for half of the atoms.
    """
    wide = name.endswith("dictionary")
    ranks = range(min(shape) // (2 if wide else 1) - (not wide), 0, -1)
    specs = (Spec(name, shape, parameters={"rank": r, **({"atoms": 2 * r} if wide else {})}) for r in ranks)
    return next(s for s in specs if spec_bytes(s, 2) <= (1 - removed) * shape[0] * shape[1] * 2)


def _bits(parameters: dict[str, Any], removed: float) -> float:
    return float(parameters.get("bits", 16 * (1 - removed)))


def layer(name: str, shape: tuple[int, int], dtype: torch.dtype, removed: float = REMOVED) -> StoredLinear:
    """A layer with random numbers of moderate size, as it is when loaded; `name` as of `spec_of`."""
    module = build(spec_of(name, shape, removed), dtype)
    module.load_state_dict(state(name, shape, dtype, removed))
    module.check_indices()
    module.lay_out()
    return module.requires_grad_(False).eval()


def state(name: str, shape: tuple[int, int], dtype: torch.dtype, removed: float = REMOVED) -> dict[str, Tensor]:
    """Stored tensors of a random weight."""
    form, parameters = FORMATS.get(name, (name, {}))
    if form == "coded":
        return {**coded(shape, _bits(parameters, removed))[1], "weight": torch.empty(0, dtype=dtype)}
    spec = spec_of(name, shape, removed)
    return {name: _tensor(name, meta, spec, dtype) for name, meta in stored_tensors(spec, dtype).items()}


def _tensor(name: str, meta: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    generator, leaf = torch.Generator().manual_seed(0), name.rpartition(".")[2]
    if leaf == "order":
        return torch.randperm(meta.shape[0], generator=generator).to(meta.dtype)
    if leaf == "positions" and spec.format == "semi_sparse":
        quads = meta.shape[1] * 2
        places = torch.rand(meta.shape[0], quads, 4, generator=generator).topk(2, dim=2).indices.sort(-1).values
        return pack(places.flatten(1), 2)
    if leaf == "positions":
        rows = spec.shape[1 if spec.format == "transposed_dictionary" else 0]
        atoms, kept = spec.parameters["atoms"], spec.parameters["rank"]
        index = torch.rand(rows, atoms, generator=generator).topk(kept, dim=1).indices
        support = torch.zeros(rows, atoms, dtype=torch.bool).scatter_(
            1, index, torch.ones_like(index, dtype=torch.bool)
        )
        return pack_bits(support) if meta.dim() == 1 else index.sort(dim=1).values.to(meta.dtype)
    if not meta.is_floating_point():
        return torch.randint(256, meta.shape, generator=generator, dtype=torch.uint8).view(meta.dtype)
    if leaf == "scale":  # of codes
        return torch.full(meta.shape, 0.1 * spec.shape[1] ** -0.5, dtype=dtype)
    made = torch.empty(meta.shape)
    nn.init.normal_(made, std=max(meta.shape[-1], 1) ** -0.5, generator=generator)
    return made.to(dtype)


@cache
def coded(shape: tuple[int, int], bits: float) -> tuple[Spec, dict[str, Tensor]]:
    """Laplacian codes of about so many bits a weight, their rows and columns of sizes that differ by octaves."""
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.exp2(0.8 * torch.randn(n, generator=generator)) for n in shape]
    drawn = torch.rand(shape, generator=generator) - 0.5
    drawn = -drawn.sign() * torch.log1p(-2 * drawn.abs().clamp(max=0.499999)) * sizes[0][:, None] * sizes[1]
    low, high = 2.0**-6, 2.0**12
    part = drawn[:: max(1, shape[0] // 256)]
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        fewer = estimated_bits((middle * part).round().int()) < bits * part.numel()
        low, high = (middle, high) if fewer else (low, middle)
    scales = Scales.nearest(shape[1] ** -0.5 / sizes[0] / low, 1 / sizes[1])
    stored = Coded.encode((low * drawn).round().int(), scales, None)
    return Spec("coded", shape, parameters={"length": len(stored["stream"])}), {"weight": torch.empty(0), **stored}
