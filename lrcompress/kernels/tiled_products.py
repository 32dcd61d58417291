"""Products with integer codes in tiles (tiles.py): an operator of torch, with gradients of the input and of gains."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.kernels import panels
from lrcompress.kernels.tiles import (
    BLOCK,
    COLUMNS,
    FEW,
    KINDS,
    NO_GAINS,
    TENSORS,
    Gains,
    Held,
    Tiles,
    codes,
    compiled,
    described,
    scales,
)
from lrcompress.kernels.tracing import check_devices, check_width, unseen

_GAINS = "Tensor? row_gain, Tensor? column_gain"
_BACK = f"(Tensor gradient, Tensor? x, Tensor? y, {TENSORS}, {_GAINS}) -> (Tensor, Tensor, Tensor)"
torch.library.define("lrcompress::tiles_linear", f"(Tensor x, {TENSORS}, {_GAINS}) -> Tensor")
torch.library.define("lrcompress::tiles_linear_backward", _BACK)


def linear(x: Tensor, held: Tiles, levels: Tensor, indices: Tensor, gains: Gains = NO_GAINS) -> Tensor:
    """x (..., in) times the transposed weight: (..., out) of x's dtype; gradients of x and of both gains or none.

    What it returns is not to be changed in place where gains are trained: their gradient reads it.
    """
    rows, columns = held.shape
    check_width(x, columns)
    check_devices(x, held.tiles)
    weight = *held, levels, indices, *(None if gain is None else gain.float() for gain in gains)
    flat = x.reshape(-1, columns)
    y = _linear(flat, *weight) if unseen(flat, *weight) else torch.ops.lrcompress.tiles_linear(flat, *weight)
    return y.reshape(*x.shape[:-1], rows)


Parts = tuple[Tiles, Tensor, Tensor, Gains]
"""Tiles, levels, indices, gains: what an operator is given of a weight."""


def _parts(tensors: Sequence[Any]) -> Parts:
    return Tiles(*tensors[:-4]), tensors[-4], tensors[-3], (tensors[-2], tensors[-1])


def _factors(parts: Parts, dtype: torch.dtype) -> Iterator[Tensor]:
    """Scales of rows and of columns with their gains."""
    held, levels, indices, gains = parts
    for scale, gain in zip(scales(levels, indices, held.shape), gains, strict=True):
        yield (scale if gain is None else scale * gain).to(dtype)


def _plain_linear(x: Tensor, *tensors: Any) -> Tensor:
    rows, columns = _factors(parts := _parts(tensors), x.dtype)
    return nn.functional.linear(x * columns, codes(parts[0]).to(x.dtype)) * rows


def _linear(x: Tensor, *tensors: Any) -> Tensor:
    native = compiled()
    if native is None or x.dtype not in (*KINDS, torch.float16):
        return _plain_linear(x, *tensors)
    held, levels, indices, gains = _parts(tensors)
    own = described(held, levels, indices, gains)
    count, few = len(x), len(x) <= FEW
    given = (x.float() if few or x.dtype not in KINDS else x).contiguous()
    if not few:
        return _by_panels(native, held, own, given).to(x.dtype)
    y = given.new_empty(count, own.rows)
    _check(native.tiles_multiply(own, given.data_ptr(), count, y.data_ptr(), torch.get_num_threads()))
    return y.to(x.dtype)


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory left to multiply by coded weights")


def _by_panels(native: ctypes.CDLL, held: Tiles, own: Held, x: Tensor) -> Tensor:
    """x (n, in) times the weight, (n, out), of which at most BLOCK rows are there unpacked at any time."""
    threads, kind, width = torch.get_num_threads(), KINDS[x.dtype], held.head.shape[1] * COLUMNS
    ordered = x.new_empty(len(x), width)
    _check(native.tiles_sort(own, x.data_ptr(), len(x), ordered.data_ptr(), kind, threads))
    if x.dtype == torch.bfloat16 and panels.fast():
        return panels.product(ordered, (own.rows, width), own, native.tiles_numbers, held.row_order, BLOCK)
    y, panel = x.new_empty(len(x), own.rows), x.new_empty(min(BLOCK, own.rows), width)
    for first in range(0, own.rows, BLOCK):
        count = min(BLOCK, own.rows - first)
        native.tiles_unpack(own, first, count, panel.data_ptr(), kind, 1, threads)
        torch.mm(ordered, panel[:count].T, out=y[:, first : first + count])
    return y


def _plain_linear_backward(gradient: Tensor, x: Tensor | None, y: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
    rows, columns = _factors(parts := _parts(tensors), gradient.dtype)
    made = (gradient * rows) @ codes(parts[0]).to(gradient.dtype) * columns
    return made, *_gain_gradients((gradient, y), (x, made), parts[-1], _plain_paired)


def _linear_backward(gradient: Tensor, x: Tensor | None, y: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
    native = compiled()
    if native is None or gradient.dtype not in KINDS:
        return _plain_linear_backward(gradient, x, y, *tensors)
    held, levels, indices, gains = _parts(tensors)
    own, threads, kind = described(held, levels, indices, gains), torch.get_num_threads(), KINDS[gradient.dtype]
    weight = gradient.new_empty(own.rows, held.head.shape[1] * COLUMNS)
    native.tiles_unpack(own, 0, own.rows, weight.data_ptr(), kind, 1, threads)
    ordered = gradient @ weight
    made = gradient.new_empty(len(gradient), own.columns)
    native.tiles_unsort(own, ordered.data_ptr(), len(ordered), made.data_ptr(), kind, threads)

    def paired(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        sums = torch.empty(a.shape[1], device="cpu")
        native.tiles_paired(a.data_ptr(), b.data_ptr(), *a.shape, sums.data_ptr(), kind, threads)
        return sums

    return made, *_gain_gradients((gradient, y), (x, made), gains, paired)


def _gain_gradients(
    rows: tuple[Tensor, Tensor | None], columns: tuple[Tensor | None, Tensor], gains: Gains,
    paired: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[Tensor]:  # fmt: skip
    """Those of row and column gains: sums over the rows of an input of what a gain multiplies times its gradient."""
    for (a, b), gain in zip((rows, columns), gains, strict=True):
        yield rows[0].new_empty(0) if gain is None or a is None or b is None else paired(a, b) / gain


def _plain_paired(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight = inputs
    ctx.save_for_backward(*((x, output) if weight[-1] is not None else (None, None)), *weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: gradient checkpointing makes them anew every time
    made, *gains = torch.ops.lrcompress.tiles_linear_backward(gradient, *saved)
    return made, *[None] * (len(saved) - 4), *(gains if saved[0] is not None else [None, None])


def _fake_linear(x: Tensor, *tensors: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], len(tensors[Tiles._fields.index("row_order")]))


def _fake_backward(gradient: Tensor, x: Tensor | None, y: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
    held, *_, gains = _parts(tensors)
    made = gradient.new_empty(gradient.shape[0], held.shape[1])
    return made, *(gradient.new_empty(0) if gain is None else torch.empty_like(gain) for gain in gains)


torch.library.register_autograd("lrcompress::tiles_linear", _backward, setup_context=_keep)
torch.library.impl("lrcompress::tiles_linear", "CompositeExplicitAutograd", _plain_linear)
torch.library.impl("lrcompress::tiles_linear", "CPU", _linear)
torch.library.impl("lrcompress::tiles_linear_backward", "CompositeExplicitAutograd", _plain_linear_backward)
torch.library.impl("lrcompress::tiles_linear_backward", "CPU", _linear_backward)
torch.library.register_fake("lrcompress::tiles_linear", _fake_linear)
torch.library.register_fake("lrcompress::tiles_linear_backward", _fake_backward)
