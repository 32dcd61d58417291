"""Products of many rows of bfloat16 with weights that compiled code (panels.c) decodes a panel at a time."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lrcompress.kernels.native import library

MOST_IN_ORDER = 1024
"""As in panels.c."""


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled code, with its arguments' types; None where it cannot be had."""
    found = library("panels")
    if found is not None:
        long, pointer, integer = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        found.panels_product.argtypes = [
            *(pointer, pointer, long, long, pointer, long),
            *(pointer, long, pointer, integer),
        ]
    return found


def fast() -> bool:
    """Whether the compiled product is as fast as torch's here."""
    found = compiled()
    return found is not None and bool(found.panels_fast())


def product(
    x: Tensor,
    shape: tuple[int, int],
    weight: ctypes.Structure | Tensor,
    numbers: Any = None,
    order: Tensor | None = None,
    block: int = 0,
) -> Tensor:
    """x (count, columns) Wᵀ: (count, rows), all in bfloat16, of a weight of `shape` (rows, columns).

    weight: the numbers, one row after the other; or what the compiled function `numbers` gives them from. order (rows,)
    int16: of every `block` rows, at most MOST_IN_ORDER, the places of their results among them; None where that is
    their order. MemoryError where there is too little.
    """
    native = compiled()
    assert native is not None
    assert x.dtype == torch.bfloat16
    assert block <= MOST_IN_ORDER
    x = x.contiguous()
    y = x.new_empty(len(x), shape[0])
    if not y.numel():
        return y
    source = weight.data_ptr() if isinstance(weight, Tensor) else ctypes.addressof(weight)
    function = None if numbers is None else ctypes.cast(numbers, ctypes.c_void_p)
    places = None if order is None else order.data_ptr()
    ends = (x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads())
    if native.panels_product(function, source, *shape, places, block, *ends):
        raise MemoryError("out of memory in a product with a stored weight")
    return y
