"""What products cost, as torch counts them, our own operators among them."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import lrcompress.kernels.products
import lrcompress.kernels.tiled_products  # noqa: F401 (both register operators)

_OWN = torch.ops.lrcompress
OPERATORS = {
    _OWN.tiles_linear: lambda x, *_, out_shape, **__: 2 * x[0] * x[1] * out_shape[1],
    _OWN.tiles_linear_backward: lambda gradient, x, y, *_, out_shape, **__: (
        2 * gradient[0] * gradient[1] * out_shape[0][1]
    ),
    torch.ops.aten._weight_int8pack_mm: lambda x, codes, *_, **__: 2 * x[0] * x[1] * codes[0],
    _OWN.numbers: lambda x, values, *_, **__: 2 * x[0] * values[0] * values[1],
    _OWN.quantized: lambda x, codes, zeros, scale, bits, columns, *_, **__: 2 * x[0] * codes[0] * columns,
    _OWN.pairs: lambda x, values, places, columns, *_, **__: 2 * x[0] * values[0] * columns,
    _OWN.sparse: lambda x, values, scale, positions, columns, *_, **__: 2 * x[0] * values[0] * columns,
}
"""Floating-point operations by the shapes of what an operator is given."""


def multiply_adds(run):
    """Of all products while `run` is called."""
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as counter:
        run()
    return counter.get_total_flops() // 2
