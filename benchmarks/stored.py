"""Random weights in every stored format, for benchmarks: how fast they multiply does not depend on what they hold."""

import torch
from torch import Tensor, nn

from lrcompress.formats import StoredLinear, build, spec_bytes, stored_tensors
from lrcompress.formats.coded import Coded, Scales
from lrcompress.linalg.packing import pack, pack_bits
from lrcompress.protocols import Spec

REMOVED = 0.5
"""Of the 16-bit bytes, by formats that have a rank."""


def quantized(bits: int, group: int) -> dict[str, object]:
    return {"bits": bits, "group": group}


def corrected(bits: int, group: int, rank: int, factor_bits: int) -> dict[str, object]:
    base = {"format": "quantized", **quantized(bits, group)}
    return {"base": base, "correction": {"format": "low_rank", "rank": rank, "bits": factor_bits}}


FORMATS: dict[str, tuple[str, dict[str, object]]] = {
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
    "coded": ("coded", {}),
}
"""Name to format and parameters; those without remove REMOVED, and codes are of about 3 bits."""


def spec_of(name: str, shape: tuple[int, int], removed: float = REMOVED) -> Spec:
    """The spec of a weight; `name` of FORMATS, or a format alone."""
    form, parameters = FORMATS.get(name, (name, {}))
    if form == "coded":
        return Spec(form, shape, parameters={"length": len(_coded(shape)["stream"])})
    if form == "sum":
        correction: dict[str, object] = dict(parameters["correction"])  # type: ignore[call-overload]
        parameters = {**parameters, "correction": {**correction, "rank": min(correction["rank"], *shape)}}  # type: ignore[type-var]
    return Spec(form, shape, parameters=parameters) if parameters else largest_spec(form, shape, removed)


def largest_spec(name: str, shape: tuple[int, int], removed: float) -> Spec:
    """The spec of the largest rank that removes at least this fraction of the 16-bit bytes.

    Of dictionaries every output has coefficients for half of the atoms.
    """
    wide = name.endswith("dictionary")
    ranks = range(min(shape) // (2 if wide else 1) - (not wide), 0, -1)
    specs = (Spec(name, shape, parameters={"rank": r, **({"atoms": 2 * r} if wide else {})}) for r in ranks)
    return next(s for s in specs if spec_bytes(s, 2) <= (1 - removed) * shape[0] * shape[1] * 2)


def layer(spec: Spec, dtype: torch.dtype) -> StoredLinear:
    """A layer with random numbers of moderate size, as it is when loaded."""
    module = build(spec, dtype)
    module.load_state_dict(state(spec, dtype))
    module.check_indices()
    module.lay_out()
    return module.requires_grad_(False).eval()


def state(spec: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors of a random weight."""
    if spec.format == "coded":
        return {**_coded(spec.shape), "weight": torch.empty(0, dtype=dtype)}
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


def _coded(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Codes of about 3 bits, rows and columns of unequal size."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.exp2(torch.linspace(-0.5, 0.5, size)) for size in shape)
    codes = (2 * rows[:, None] * columns * torch.randn(shape, generator=generator)).round().int()
    step = 0.5 * shape[1] ** -0.5
    return Coded.encode(codes, Scales.nearest(step / rows, 1 / columns), None)
