"""Outputs that come in two parts, put into their places: an operator of torch, so that its tracing sees through it."""

import ctypes

import torch
from torch import Tensor

from lrcompress.kernels.native import library

NO_MEMORY, OUT_OF_RANGE = 1, 2


def placed(first: Tensor, rest: Tensor, order: Tensor) -> Tensor:
    """(..., a + b): at place j number order[j] of first (..., a) followed by rest (..., b).

    order (a + b,) int16 or int32. IndexError where it names a place that is not there.
    """
    learnt = torch.is_grad_enabled() and (first.requires_grad or rest.requires_grad)
    # In two dimensions: torch selects along the last of three several times slower.
    parts = first.reshape(-1, first.shape[-1]), rest.reshape(-1, rest.shape[-1])
    # What torch compiles does it in one go.
    place = _selected if learnt or torch.compiler.is_compiling() else torch.ops.lrcompress.placed
    y: Tensor = place(*parts, order)
    return y.view(*first.shape[:-1], len(order))


def _selected(first: Tensor, rest: Tensor, order: Tensor) -> Tensor:
    return torch.cat([first, rest], dim=-1).index_select(1, order.long())


def _placed(first: Tensor, rest: Tensor, order: Tensor) -> Tensor:
    compiled = library("rows") if first.device.type == "cpu" and first.dtype == rest.dtype else None
    if compiled is None or first.itemsize not in (2, 4) or order.itemsize not in (2, 4):
        return _selected(first, rest, order)
    first, rest, order = first.contiguous(), rest.contiguous(), order.contiguous()
    y = first.new_empty(len(first), len(order))
    sizes = (len(first), first.shape[1], rest.shape[1])
    pointers = (first.data_ptr(), rest.data_ptr(), order.data_ptr(), y.data_ptr())
    place = compiled.placed
    if place.argtypes is None:
        place.argtypes = [*3 * [ctypes.c_int64], *4 * [ctypes.c_void_p], *2 * [ctypes.c_int32]]
        place.restype = ctypes.c_int
    failed = place(*sizes, *pointers, first.itemsize, order.itemsize)
    if failed == OUT_OF_RANGE:
        raise IndexError(f"an order of {len(order)} outputs names a place that is not there")
    if failed == NO_MEMORY:
        raise MemoryError("out of memory while outputs are put into their places")
    return y


torch.library.define("lrcompress::placed", "(Tensor first, Tensor rest, Tensor order) -> Tensor")
torch.library.impl("lrcompress::placed", "CompositeExplicitAutograd", _placed)
torch.library.register_fake("lrcompress::placed", lambda first, rest, order: first.new_empty(len(first), len(order)))
