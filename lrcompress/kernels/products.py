"""Products with weights that are stored row by row: operators of torch, so that its tracing sees through them.

Few rows of x are multiplied by compiled code (rows.c) that decodes weights in registers; those that are numbers already
it reads faster than torch does. For many rows a panel of the weight's rows at a time is decoded into memory that the
next one uses again, and multiplied by compiled code (panels.c) in bfloat16 where the processor has products of it,
otherwise by torch. Where nothing can be compiled, on other devices and in other dtypes torch
alone decodes the panels. Gradients are those of x, and of the scales of quantised weights.
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrcompress.kernels import panels
from lrcompress.kernels.native import library
from lrcompress.kernels.rows import KINDS, NumberRows, PairRows, QuantizedRows, Rows, SparseRows
from lrcompress.kernels.tracing import check_devices, check_width, in_autocast, plain, unseen

FEW = 8
"""Rows of x up to which products on what is stored are faster than panels."""

FEW_OF_NUMBERS, LONG = 4, 4096
"""The same for weights that are numbers already; for rows of more than LONG columns it is one."""

MANY_OF_NUMBERS = 256
"""Rows of x from which compiled panels are faster than torch for weights that are numbers already."""

PANEL = 2**22
"""Bytes of a panel that torch multiplies, at most: of longer ones its product is slower in float32, of shorter ones in
bfloat16."""

GATHER_ROWS, GATHER_COLUMNS, CHUNK = 32, 3, 128
"""From so many rows of x, in float32, and columns for each stored number on only those numbers are multiplied."""

COMPILED, GATHERED, COMPILED_PANELS, PANELS, PLAIN, DENSE_PRODUCT = (
    "compiled, on what is stored", "compiled, on what is stored, sparse", "compiled, by panels", "panels, compiled",
    "panels, plain torch", "dense product",
)  # fmt: skip
"""Names of the ways, for people."""

PRODUCT_ARGUMENTS = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p)
ARGUMENTS = {
    "numbers": (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32),
    "gathered": (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
}
"""Of the compiled functions, after the weight."""

Functions = tuple[Callable[[str], Any], ctypes.Structure]
"""What finds a weight's compiled functions by name, and what they read of it."""


def way(weight: Rows, count: int, dtype: torch.dtype, *, transposed: bool = False) -> str:
    """How `count` rows of `dtype` are multiplied by the weight, or by its transpose."""
    return _way(_functions(weight, dtype), weight, count, dtype, transposed=transposed)


def _way(functions: Functions | None, weight: Rows, count: int, dtype: torch.dtype, *, transposed: bool) -> str:
    numbers = isinstance(weight, NumberRows)
    if functions is None:
        return DENSE_PRODUCT if numbers else PLAIN
    if 0 < count <= few_rows(weight):
        return COMPILED
    if not transposed and _gathers(weight, count, dtype):
        return GATHERED
    if not transposed and (count >= MANY_OF_NUMBERS or not numbers) and _by_compiled_panels(dtype):
        return COMPILED_PANELS
    return DENSE_PRODUCT if numbers else PANELS


def _by_compiled_panels(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and library("rows") is not None and panels.fast()


def few_rows(weight: Rows) -> int:
    """Rows of x up to which compiled code multiplies them by what is stored."""
    if not isinstance(weight, NumberRows):
        return FEW
    return 1 if weight.columns > LONG else FEW_OF_NUMBERS


def _gathers(weight: Rows, count: int, dtype: torch.dtype) -> bool:
    if not isinstance(weight, SparseRows) or dtype != torch.float32 or weight.dtype != dtype:
        return False
    return count >= GATHER_ROWS and weight.columns >= GATHER_COLUMNS * weight.values.shape[1]


def quantized(x: Tensor, weight: QuantizedRows, *, transposed: bool = False) -> Tensor:
    """x (..., columns) Wᵀ; or, transposed, x (..., rows) W."""
    return _called(torch.ops.lrcompress.quantized, x, weight, transposed=transposed)


def sparse(x: Tensor, weight: SparseRows, *, transposed: bool = False) -> Tensor:
    """x (..., columns) Wᵀ; or, transposed, x (..., rows) W."""
    return _called(torch.ops.lrcompress.sparse, x, weight, transposed=transposed)


def pairs(x: Tensor, weight: PairRows, *, transposed: bool = False) -> Tensor:
    """x (..., columns) Wᵀ; or, transposed, x (..., rows) W."""
    return _called(torch.ops.lrcompress.pairs, x, weight, transposed=transposed)


def linear(x: Tensor, values: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """x (..., columns) Wᵀ + bias of the numbers values W (rows, columns); or, transposed, x (..., rows) W.

    Gradients of x, W and the bias; where W's are wanted, or x has many rows, it is torch's own product.
    """
    weight, width = NumberRows(values), x.shape[-1]
    few, many = few_rows(weight) * width, MANY_OF_NUMBERS * width
    own = torch.compiler.is_compiling() or 0 < x.numel() <= few  # a trace is for any number of rows
    own = own or (x.numel() >= many > 0 and not transposed and _by_compiled_panels(x.dtype))
    own = own and x.device.type == "cpu"
    learnt = torch.is_grad_enabled() and values.requires_grad
    own = own and (torch.compiler.is_compiling() or plain(values))
    if learnt or not own or x.dtype != values.dtype or torch.is_autocast_enabled(x.device.type):
        return x @ values if transposed else torch.nn.functional.linear(x, values, bias)
    y = _called(torch.ops.lrcompress.numbers, x, weight, transposed=transposed)
    return y if bias is None else y + bias


def _called(operator: Callable[..., Tensor], x: Tensor, weight: Rows, *, transposed: bool) -> Tensor:
    check_width(x, weight.rows if transposed else weight.columns)
    check_devices(x, weight.tensors[0])
    x = in_autocast(x)
    flat = x.reshape(-1, x.shape[-1])
    if unseen(x, *weight.tensors):
        y = multiply(flat, weight, transposed=transposed)
    else:
        y = operator(flat, *weight.parts, transposed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def multiply(x: Tensor, weight: Rows, *, transposed: bool) -> Tensor:
    """x (count, columns) Wᵀ, or x (count, rows) W, in the dtype of x."""
    functions = _functions(weight, x.dtype)
    kind = _way(functions, weight, len(x), x.dtype, transposed=transposed)
    if isinstance(weight, NumberRows) and kind == DENSE_PRODUCT:
        return x @ weight.values if transposed else torch.nn.functional.linear(x, weight.values)
    if functions is None or kind == PANELS:
        return _added(x, weight) if transposed else _by_panels(x, weight)
    if kind == GATHERED:
        return _gathered(x, weight, functions)
    named, described = functions
    if kind == COMPILED_PANELS:
        shape = weight.rows, weight.columns
        if isinstance(weight, NumberRows):
            return panels.product(x, shape, weight.values)
        return panels.product(x, shape, described, named("numbers"))
    x = x.contiguous()
    y = x.new_empty(len(x), weight.columns if transposed else weight.rows)
    function = named("transposed" if transposed else "product")
    _check(function(ctypes.byref(described), x.data_ptr(), KINDS[x.dtype], len(x), y.data_ptr()))
    return y


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("out of memory in a product with a stored weight")


def _gathered(x: Tensor, weight: Rows, functions: Functions) -> Tensor:
    count = -(-len(x) // CHUNK) * CHUNK
    z, y = x.new_zeros(weight.columns, count), x.new_empty(weight.rows, count)
    z[:, : len(x)] = x.T
    named, described = functions
    _check(named("gathered")(ctypes.byref(described), z.data_ptr(), count, y.data_ptr()))
    return y[:, : len(x)].T


def _by_panels(x: Tensor, weight: Rows) -> Tensor:
    y = x.new_empty(len(x), weight.rows)
    for start, panel in _panels(weight, x.dtype):
        part = y[:, start : start + len(panel)]
        if x.dtype == torch.bfloat16:
            torch.mm(x, panel.T, out=part)
        else:  # oneDNN writes into a part of a matrix as fast, BLAS does not
            part.copy_(torch.nn.functional.linear(x, panel))
    return y


def _added(x: Tensor, weight: Rows) -> Tensor:
    """The transposed product: a sum over panels, which is added up in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(len(x), weight.columns, dtype=wide)
    for start, panel in _panels(weight, x.dtype):
        y += x[:, start : start + len(panel)] @ panel
    return y.to(x.dtype)


def _panels(weight: Rows, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """First row and numbers of every panel; a panel is overwritten by the next."""
    functions, height = _functions(weight, dtype), max(1, PANEL // (weight.columns * dtype.itemsize))
    scratch = None
    for start in range(0, weight.rows, height):
        stop = min(start + height, weight.rows)
        if functions is None:
            yield start, weight.numbers(start, stop).to(dtype)
            continue
        if scratch is None:
            scratch = torch.empty(stop - start, weight.columns, dtype=dtype, device="cpu")
        named, described = functions
        named("numbers")(ctypes.byref(described), start, stop, scratch.data_ptr(), KINDS[dtype])
        yield start, scratch[: stop - start]


def _functions(weight: Rows, dtype: torch.dtype) -> Functions | None:
    """Those of a weight; None where they cannot be used."""
    tensors = weight.tensors
    if dtype not in KINDS or any(t.device.type != "cpu" or not t.is_contiguous() for t in tensors):
        return None
    described = weight.described()
    compiled = None if described is None else library("rows")
    if described is None or compiled is None:
        return None
    name, structure = described

    def named(what: str) -> Any:
        function = getattr(compiled, f"{name}_{what}")
        if function.argtypes is None:
            function.argtypes = [ctypes.c_void_p, *ARGUMENTS.get(what, PRODUCT_ARGUMENTS)]
            function.restype = None if what == "numbers" else ctypes.c_int
        return function

    return named, structure


def _scale_gradient(gradient: Tensor, x: Tensor, *given: Any) -> Tensor:
    """(rows, groups): that of the scales of QuantizedRows(*given but the last) in the product, or its transpose."""
    codes, zeros, scale, bits, columns, group, transposed = given
    outputs, inputs = (x, gradient) if transposed else (gradient, x)
    found = torch.empty_like(scale)
    for start, panel in _panels(QuantizedRows(codes, zeros, torch.ones_like(scale), bits, columns, group), x.dtype):
        rows = slice(start, start + len(panel))
        made = outputs[:, rows].T @ inputs * panel
        made = torch.nn.functional.pad(made, (0, scale.shape[1] * group - columns))
        found[rows] = made.view(len(panel), -1, group).sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return found


_PARTS = "Tensor codes, Tensor? zeros, Tensor scale, int bits, int columns, int group"
_SCALES = f"(Tensor gradient, Tensor x, {_PARTS}, bool transposed) -> Tensor"
torch.library.define("lrcompress::quantized_scale_gradient", _SCALES)
torch.library.impl("lrcompress::quantized_scale_gradient", "CompositeExplicitAutograd", _scale_gradient)
torch.library.register_fake("lrcompress::quantized_scale_gradient", lambda *given: torch.empty_like(given[4]))


def _operator(name: str, parts: str, kind: Callable[..., Rows], learnt: int | None = None) -> None:
    """Define lrcompress::name(x, the parts of a weight of `kind`, transposed); part `learnt` has a gradient.

    That is what lrcompress::name_scale_gradient(gradient, x, the parts, transposed) gives.
    """
    torch.library.define(f"lrcompress::{name}", f"(Tensor x, {parts}, bool transposed) -> Tensor")

    def run(x: Tensor, *given: Any) -> Tensor:
        return multiply(x, kind(*given[:-1]), transposed=given[-1])

    def shape(x: Tensor, *given: Any) -> Tensor:
        weight = kind(*given[:-1])
        return x.new_empty(x.shape[0], weight.columns if given[-1] else weight.rows)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plain = [None if isinstance(part, Tensor) else part for part in inputs[1:]]
        ctx.places = [place for place, part in enumerate(inputs[1:]) if isinstance(part, Tensor)]
        ctx.learns = learnt is not None and ctx.needs_input_grad[1 + learnt]
        ctx.save_for_backward(
            *(part for part in inputs[1:] if isinstance(part, Tensor)), inputs[0] if ctx.learns else None
        )

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, x = ctx.saved_tensors
        given = list(ctx.plain)
        found: list[Tensor | None] = [None] * len(given)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            given[place] = tensor
        if learnt is not None and ctx.learns:
            found[learnt] = getattr(torch.ops.lrcompress, f"{name}_scale_gradient")(gradient, x, *given)
        operator = getattr(torch.ops.lrcompress, name)
        return operator(gradient, *given[:-1], not given[-1]), *found

    torch.library.impl(f"lrcompress::{name}", "CompositeExplicitAutograd", run)
    torch.library.register_fake(f"lrcompress::{name}", shape)
    torch.library.register_autograd(f"lrcompress::{name}", backward, setup_context=keep)


_operator("quantized", _PARTS, QuantizedRows, learnt=2)
_operator("sparse", "Tensor values, Tensor? scale, Tensor positions, int columns", SparseRows)
_operator("pairs", "Tensor values, Tensor positions, int columns", PairRows)
_operator("numbers", "Tensor values", NumberRows)
