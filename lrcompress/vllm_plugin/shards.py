"""The part of a stored weight that one process of several holds: some rows, or some columns.

Everything is cut as it is stored, so that integers stay integers and no number changes; what cannot be cut (a
dictionary's) is multiplied out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lrcompress.coding import decode, encode
from lrcompress.formats import restored
from lrcompress.formats.coded import GRID_BYTES, Coded
from lrcompress.formats.low_rank import LowRank
from lrcompress.formats.pivoted import Pivoted
from lrcompress.formats.quantized import Quantized
from lrcompress.formats.semi_sparse import SemiSparse
from lrcompress.formats.sum import Sum, part
from lrcompress.kernels.rows import KEPT, PLACE_BITS, WIDTH
from lrcompress.linalg.packing import pack, unpack
from lrcompress.protocols import Spec

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Cut:
    """Rows (a tensor of indices) or neighbouring columns of a weight; first: whether the bias is this process's."""

    rows: Tensor | None = None
    columns: tuple[int, int] | None = None
    first: bool = True

    def shape(self, spec: Spec) -> tuple[int, int]:
        """(out, in) of the part."""
        rows = spec.shape[0] if self.rows is None else len(self.rows)
        return rows, spec.shape[1] if self.columns is None else self.columns[1] - self.columns[0]

    def of_rows(self, tensor: Tensor) -> Tensor:
        """A tensor (out, ...)."""
        return tensor if self.rows is None else tensor[self.rows]

    def of_columns(self, tensor: Tensor) -> Tensor:
        """A tensor (..., in)."""
        return tensor if self.columns is None else tensor[..., slice(*self.columns)]

    def of_codes(self, packed: Tensor, bits: int, count: int) -> Tensor:
        """Packed codes of `count` columns."""
        return packed if self.columns is None else pack(self.of_columns(unpack(packed, bits, count)), bits)


def shard(spec: Spec, tensors: Mapping[str, Tensor], cut: Cut | None, dtype: torch.dtype) -> nn.Module:
    """The layer that multiplies by a part of a stored weight, computing in `dtype`; None is the whole."""
    stored = {key: tensor for key, tensor in tensors.items() if key != "weight"}
    if cut is None:
        layer: nn.Module = restored(spec, stored, dtype)
    elif _can_cut(spec, cut):
        bias = stored.pop("bias", None)
        found, inner = CUTS[spec.format](spec.alone(), stored, cut)
        if bias is not None and cut.first:
            inner["bias"] = cut.of_rows(bias)
        layer = restored(replace(found, bias=_has_bias(found, inner)), inner, dtype)
    else:
        layer = _dense(spec, stored, cut, dtype)
    getattr(layer, "lay_out", lambda: None)()
    return layer.requires_grad_(False)


def _can_cut(spec: Spec, cut: Cut) -> bool:
    """Whether the part has the format of the whole: not where a four of a 2:4 weight is divided, nor with more
    components than a part has rows or columns, which would be larger than dense."""
    inner = part(spec, "base") if spec.format == Sum.name else spec
    between = inner.format == SemiSparse.name and cut.columns is not None
    divided = between and any(column % WIDTH and column != spec.shape[1] for column in cut.columns or ())
    return spec.format in CUTS and inner.format in CUTS and not divided and spec.rank <= min(cut.shape(spec))


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear of these tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer


def _dense(spec: Spec, stored: Tensors, cut: Cut, dtype: torch.dtype) -> nn.Module:
    whole = restored(spec, stored, torch.float32)
    bias = whole.dense_bias() if cut.first else None
    weight = cut.of_columns(cut.of_rows(whole.dense()))
    return dense_linear(weight.to(dtype), None if bias is None else cut.of_rows(bias).to(dtype))


def _has_bias(spec: Spec, tensors: Tensors) -> bool:
    return any(key == "bias" or key.endswith(".bias") for key in tensors)


def _low_rank(spec: Spec, stored: Tensors, cut: Cut) -> tuple[Spec, Tensors]:
    found = {"A.weight": cut.of_columns(stored["A.weight"]), "B.weight": cut.of_rows(stored["B.weight"])}
    if "B.bias" in stored and cut.first:
        found["B.bias"] = cut.of_rows(stored["B.bias"])
    return replace(spec, shape=cut.shape(spec)), found


def _pivoted(spec: Spec, stored: Tensors, cut: Cut) -> tuple[Spec, Tensors]:
    """Of columns it stays pivoted; some rows are a product of two factors."""
    if cut.rows is None:
        found = {**stored, "pivot.weight": cut.of_columns(stored["pivot.weight"])}
        if not cut.first:
            found.pop("pivot.bias", None)
            found.pop("rest.bias", None)
        return replace(spec, shape=cut.shape(spec)), found
    whole = restored(spec, stored, torch.float32)
    assert isinstance(whole, Pivoted)
    left, right = whole.factors()
    found, bias = {"A.weight": right.detach(), "B.weight": cut.of_rows(left).detach()}, whole.dense_bias()
    if bias is not None:
        found["B.bias"] = cut.of_rows(bias).detach()
    parameters = {"rank": spec.rank}
    return Spec(LowRank.name, cut.shape(spec), parameters=parameters), found


def _quantized(spec: Spec, stored: Tensors, cut: Cut) -> tuple[Spec, Tensors]:
    """Groups that a cut would divide become smaller ones of the same scale."""
    bits, width = spec.parameters["bits"], spec.shape[1]
    group = min(spec.parameters["group"], width)
    groups = -(-width // group)
    codes, zeros, scale = (cut.of_rows(stored[key]) for key in ("codes", "zeros", "scale"))
    if cut.columns is not None:
        small = math.gcd(group, *cut.columns)
        chosen = torch.arange(cut.columns[0], cut.columns[1], small) // group
        scale, zeros = scale[:, chosen], pack(unpack(zeros, bits, groups)[:, chosen], bits)
        codes, group = cut.of_codes(codes, bits, width), small
    parameters = {"bits": bits, "group": group}
    return replace(spec, shape=cut.shape(spec), parameters=parameters), {"codes": codes, "zeros": zeros, "scale": scale}


def _coded(spec: Spec, stored: Tensors, cut: Cut) -> tuple[Spec, Tensors]:
    """The grids of the scales stay, so that no scale moves."""
    codes = cut.of_columns(cut.of_rows(decode(stored["stream"], spec.shape)))
    grid, rows, columns = stored["scales"].split([GRID_BYTES, *spec.shape])
    stream = encode(codes.contiguous())
    parameters = {**spec.parameters, "length": len(stream)}
    found = {"stream": stream, "scales": torch.cat([grid, cut.of_rows(rows), cut.of_columns(columns)])}
    return replace(spec, shape=cut.shape(spec), parameters=parameters), found


def _semi_sparse(spec: Spec, stored: Tensors, cut: Cut) -> tuple[Spec, Tensors]:
    """Columns are cut between fours alone."""
    values, positions = cut.of_rows(stored["values"]), cut.of_rows(stored["positions"])
    if cut.columns is not None:
        first, last = KEPT * cut.columns[0] // WIDTH, KEPT * -(-cut.columns[1] // WIDTH)
        places = unpack(positions, PLACE_BITS, values.shape[1])[:, first:last]
        values, positions = values[:, first:last], pack(places, PLACE_BITS)
    return replace(spec, shape=cut.shape(spec)), {"values": values.contiguous(), "positions": positions}


def _sum(spec: Spec, stored: Tensors, cut: Cut) -> tuple[Spec, Tensors]:
    prefix = "base."
    inner = {key.removeprefix(prefix): t for key, t in stored.items() if key.startswith(prefix)}
    base, tensors = CUTS[part(spec, "base").format](part(spec, "base"), inner, cut)
    found = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
    correction = spec.parameters["correction"]
    if correction["bits"] == 16:
        found |= {"A.weight": cut.of_columns(stored["A.weight"]), "B.weight": cut.of_rows(stored["B.weight"])}
    else:
        bits, (rows, width) = correction["bits"], spec.shape
        outputs = unpack(stored["B_codes"], bits, rows)
        found["A_codes"] = cut.of_codes(stored["A_codes"], bits, width)
        found["B_codes"] = pack(outputs if cut.rows is None else outputs[:, cut.rows], bits)
        found["scale"] = stored["scale"]
    parameters = {**spec.parameters, "base": {"format": base.format, **base.parameters}}
    return replace(spec, shape=cut.shape(spec), parameters=parameters), found


CUTS: dict[str, Callable[[Spec, Tensors, Cut], tuple[Spec, Tensors]]] = {
    LowRank.name: _low_rank,
    Pivoted.name: _pivoted,
    Quantized.name: _quantized,
    Coded.name: _coded,
    SemiSparse.name: _semi_sparse,
    Sum.name: _sum,
}
"""How the stored tensors of a part, and its spec, come from the whole's; a bias is not among them."""
