"""Random weights of every kind that is stored row by row, and a check of their products against float64."""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from lrcompress.kernels.products import multiply
from lrcompress.kernels.rows import NumberRows, PairRows, QuantizedRows, Rows, SparseRows
from lrcompress.linalg.dictionary import largest
from lrcompress.linalg.packing import pack, pack_bits

SHAPES = [(1, 1), (5, 16), (24, 40), (7, 97), (3, 200)]
"""(rows, columns)."""
LONG = (6, 4101)
"""So long that some kinds take several rows at once."""
COUNTS = [1, 7, 40]
"""Rows of x: one, four and three more, and by panels."""


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def quantized(rows: int, columns: int, dtype: torch.dtype, bits: int, group: int) -> QuantizedRows:
    generator = torch.Generator().manual_seed(bits)
    groups = -(-columns // group)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(2**bits, (rows, groups), generator=generator)
    scale = torch.rand(rows, groups, generator=generator).to(dtype)
    return QuantizedRows(pack(codes, bits), pack(zeros, bits), scale, bits, columns, min(group, columns))


def signed(rows: int, columns: int, dtype: torch.dtype) -> QuantizedRows:
    codes = torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    return QuantizedRows(codes, None, random(rows, 1).to(dtype), 8, columns, columns)


def sparse(rows: int, columns: int, dtype: torch.dtype, nonzeros: int, bits: int, form: str) -> SparseRows:
    support = largest(random(rows, columns).abs(), nonzeros)
    index = support.nonzero()[:, 1].reshape(rows, nonzeros)
    positions = pack_bits(support) if form == "mask" else index.to(getattr(torch, form))
    if bits == 8:
        values = torch.randint(-128, 128, (rows, nonzeros), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        return SparseRows(values, random(rows).to(dtype), positions, columns)
    return SparseRows(random(rows, nonzeros).to(dtype), None, positions, columns)


def pairs(rows: int, columns: int, dtype: torch.dtype) -> PairRows:
    quads = -(-columns // 4)
    places = torch.rand(rows, quads, 4, generator=torch.Generator().manual_seed(0)).topk(2, dim=2).indices.sort().values
    values = random(rows, 2 * quads).to(dtype)
    return PairRows(values, pack(places.flatten(1), 2), columns)


def weights(rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, Rows]]:
    """A name and a weight of every kind."""
    for bits in (2, 3, 4, 8):
        for group in sorted({7, 16, 32, 64, columns}):
            yield f"{bits} bits in groups of {group}", quantized(rows, columns, dtype, bits, group)
    yield "int8", signed(rows, columns, dtype)
    for nonzeros in sorted({1, -(-columns // 4), columns}):
        for bits in (8, 16):
            for form in ("mask", "int16" if bits == 8 else "int32"):
                yield f"{nonzeros} numbers of {bits} bits, {form}", sparse(rows, columns, dtype, nonzeros, bits, form)
    yield "pairs", pairs(rows, columns, dtype)
    yield "as they are", NumberRows(random(rows, columns).to(dtype))


def check(name: str, weight: Rows, count: int, dtype: torch.dtype) -> None:
    """Both products to what rounding every number and the sum to the dtype, and sums in float32, may err."""
    for transposed in (False, True):
        x = random(count, weight.rows if transposed else weight.columns).to(weight.tensors[0].device, dtype)
        whole = weight.numbers(0, weight.rows).double()
        whole = whole if transposed else whole.T
        found, exact, size = (
            multiply(x, weight, transposed=transposed),
            x.double() @ whole,
            x.double().abs() @ whole.abs(),
        )
        assert found.dtype == dtype
        off, terms = (found.double() - exact).abs(), x.shape[1] + 8
        allowed = (2 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps) * size
        assert bool((off <= allowed).all()), f"{name}, {count} rows, {dtype}, transposed {transposed}: {off.max()}"


def moved(weight: Rows, device: torch.device) -> Rows:
    """The same weight on a device."""
    parts = {f.name: getattr(weight, f.name) for f in fields(weight)}
    return replace(weight, **{name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)})


def check_some() -> None:
    """Every kind, in the shape that fits nothing and in long rows."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape, counts in (((7, 97), COUNTS), (LONG, (1,))):
            for name, weight in weights(*shape, dtype):
                for count in counts:
                    check(name, weight, count, dtype)
