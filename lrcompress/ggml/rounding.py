"""A weight rounded onto a block type so that its layer's outputs change least: scales and codes found in the metric."""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lrcompress.ggml.plain import round_in_strips
from lrcompress.ggml.types import Blocks, BlockType
from lrcompress.kernels.native import library
from lrcompress.linalg.two_sided import unit_factor
from lrcompress.precision import wide, widened

DAMPING = 0.01
"""Of the inputs' Gram, relative to its mean, and OUTPUT_DAMPING of the outputs'."""
OUTPUT_DAMPING = 0.1

ROUNDS, PASSES = 2, 4
"""How often every row is gone to, and how often at most all runs of a row then."""


@dataclass
class Metric:
    """The loss tr(C_g E C_x Eᵀ) of an error E (m, n), in parts, all float32.

    gram C_x (n, n) = factor diag(diagonal) factorᵀ, factor unit upper triangular, its mean diagonal 1; run_factor
    (k, b, b) and run_diagonal (k, b): the same of the k runs of b columns each alone, with the inverses of their Grams.
    rows C_g (m, m) and rows_factor likewise, None where rows are independent.
    """

    gram: Tensor
    factor: Tensor
    diagonal: Tensor
    run_factor: Tensor
    run_diagonal: Tensor
    run_inverse: Tensor
    rows: Tensor | None
    rows_factor: Tensor | None


def make_metric(inputs: Tensor, outputs: Tensor | None, run: int, damping: float, output_damping: float) -> Metric:
    """The metric of Grams inputs (n, n) and outputs (m, m), wide, damped relative to their means.

    ArithmeticError where one is not positive semidefinite.
    """
    factor, diagonal = (widened(part) for part in unit_factor(inputs, damping))
    diagonal = diagonal / diagonal.mean().clamp_min(torch.finfo(diagonal.dtype).tiny)
    gram = (factor * diagonal) @ factor.T
    spans = torch.stack([part[:, at] for at, part in _diagonal_blocks(gram, run)])
    upper = torch.linalg.cholesky(spans.flip(-1, -2)).flip(-1, -2)
    own = upper.diagonal(dim1=-2, dim2=-1)
    rows = rows_factor = None
    if outputs is not None:
        rows_factor, weights = (widened(part) for part in unit_factor(outputs, output_damping))
        weights = weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)
        rows = ((rows_factor * weights) @ rows_factor.T).float().contiguous()
        rows_factor = rows_factor.float().contiguous()

    def ready(part: Tensor) -> Tensor:
        return part.float().contiguous()

    own_parts = ready(upper / own[:, None, :]), ready(own.square()), ready(torch.linalg.inv(spans))
    return Metric(ready(gram), ready(factor), ready(diagonal), *own_parts, rows, rows_factor)


def _diagonal_blocks(gram: Tensor, run: int) -> list[tuple[slice, Tensor]]:
    spans = [slice(start, start + run) for start in range(0, len(gram), run)]
    return [(span, gram[span]) for span in spans]


def round_weight(
    kind: BlockType,
    weight: Tensor,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    *,
    damping: float = DAMPING,
    output_damping: float = OUTPUT_DAMPING,
    rounds: int = ROUNDS,
    passes: int = PASSES,
) -> Tensor:
    """Bytes (m, n / block * size), uint8, of weight (m, n) on `kind`, n a multiple of its block.

    inputs (n, n) and outputs (m, m) as in `Metric`, the identity where None. Rows that count most come first, and every
    following one makes up for what they get wrong; within a row, a block's scales are chosen when it is reached, then
    every run of codes is chosen anew, with scales near its own, given all others, until nothing changes.
    """
    m, n = weight.shape
    identity = torch.eye(n, dtype=wide(weight.device), device=weight.device)
    order = torch.arange(m, device=weight.device)
    if outputs is not None:
        order = outputs.diagonal().argsort(descending=True, stable=True)
        outputs = widened(outputs[order][:, order])
    metric = make_metric(identity if inputs is None else widened(inputs), outputs, kind.run, damping, output_damping)
    target = weight.float()[order].contiguous()
    native = None if weight.device.type != "cpu" else library("blocks")
    if native is None:
        blocks = round_in_strips(kind, target, metric, passes)
    else:
        blocks = _round_natively(_typed(native), kind, target, metric, rounds, passes)
    packed = kind.pack(blocks).reshape(m, -1)
    found = torch.empty_like(packed)
    found[order] = packed
    return found


_WHOLE = ("m", "n", "block", "run", "count", "uniform", "powers", "has_minimum", "has_steps", "has_offsets")
_BOOK = ("width", "base", "even")
_ENDS = ("step_low", "step_high", "stride", "offset_low", "offset_high", "rounds", "passes")
_GIVEN = ("levels", "entries", "near", "target", "gram", "factor", "diagonal", "run_factor", "run_diagonal")
_MORE_GIVEN = ("run_inverse", "rows", "rows_factor")
_FOUND = ("numbers", "codes", "scale", "minimum", "steps", "offsets")


class _Job(ctypes.Structure):
    """What kernels/blocks.c calls a job."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_WHOLE, *_BOOK, *_ENDS)),
        *((name, ctypes.c_void_p) for name in (*_GIVEN, *_MORE_GIVEN, *_FOUND)),
    ]


@cache
def _typed(native: ctypes.CDLL) -> ctypes.CDLL:
    native.round_rows.argtypes = [ctypes.POINTER(_Job)]
    native.round_rows.restype = ctypes.c_int
    return native


def _round_natively(
    native: ctypes.CDLL, kind: BlockType, target: Tensor, metric: Metric, rounds: int, passes: int
) -> Blocks:
    (m, n), book = target.shape, None if kind.book is None else kind.book()
    tensors = {
        **({} if book is None else {"entries": book.entries, "near": book.near}),
        **{key: value for key, value in vars(metric).items() if value is not None},
        "levels": torch.tensor(kind.levels, dtype=torch.float32),
        "target": target,
        "numbers": torch.empty(m, n),
        "codes": torch.empty(m, n, dtype=torch.uint8),
        "scale": torch.zeros(m, n // kind.block),
        "minimum": torch.zeros(m, n // kind.block),
        "steps": torch.zeros(m, n // kind.run, dtype=torch.int16),
        "offsets": torch.zeros(m, n // kind.run, dtype=torch.int16),
    }
    whole = (m, n, kind.block, kind.run, len(kind.levels), kind.uniform, kind.powers, kind.has_minimum)
    held = (0, 0, False) if book is None else (book.width, book.base, book.even)
    ends = (*(kind.steps or (0, 0)), kind.stride, *(kind.offsets or (0, 0)))
    pointers = [tensors[name].data_ptr() if name in tensors else None for name in (*_GIVEN, *_MORE_GIVEN, *_FOUND)]
    job = _Job(*whole, kind.steps is not None, kind.offsets is not None, *held, *ends, rounds, passes, *pointers)
    if native.round_rows(ctypes.byref(job)):
        raise MemoryError("no memory left to round a weight")
    per = kind.block // kind.run
    return Blocks(
        tensors["codes"].reshape(-1, kind.block),
        tensors["scale"].reshape(-1),
        tensors["minimum"].reshape(-1) if kind.has_minimum else None,
        tensors["steps"].reshape(-1, per) if kind.steps else None,
        tensors["offsets"].reshape(-1, per) if kind.offsets else None,
    )
