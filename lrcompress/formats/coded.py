"""Coded: integer codes through an entropy coder, a scale for every row and every column."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.coding import decode, encode
from lrcompress.errors import InputError
from lrcompress.formats.base import DENSE_PRODUCT, FORMATS, LeafLinear, StoredLinear, added_bias_bytes, held
from lrcompress.protocols import Spec

GRID_BYTES = 16
"""Four little-endian float32: of rows, then of columns, the log2 of the smallest scale and the step between two."""

FEW_ROWS = 4
"""Up to so many rows torch's product with int8 weights is faster than one with codes that are converted first: a row of
bfloat16 with 8192 x 2048 codes takes 0.46 ms instead of 22, 16 rows of float32 3 times as long."""

LEVELS = 255
"""Largest index of a scale."""


@dataclass(frozen=True)
class Scales:
    """Positive scales of rows (out,) and columns (in,), float32, each log2 on a grid of 256 points.

    A grid spans its scales evenly, so that a point is at most 1 / 510 of their range in octaves away.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def nearest(cls, rows: Tensor, columns: Tensor) -> "Scales":
        """The scales as they are stored; ValueError where one is not positive and finite."""
        return cls.read(cls(rows.float(), columns.float()).stored(), len(rows), len(columns))

    def stored(self) -> Tensor:
        """uint8 (16 + out + in,): both grids, an index for every row and every column."""
        grid, indices = [], []
        for scales in (self.rows, self.columns):
            logs = scales.detach().cpu().double().log2()
            if not bool(torch.isfinite(logs).all()):
                raise ValueError("a scale is not a positive, finite number")
            low = struct.unpack("<f", struct.pack("<f", float(logs.min())))[0]
            step = struct.unpack("<f", struct.pack("<f", max(0.0, float(logs.max()) - low) / LEVELS))[0]
            grid += [low, step]
            index = ((logs - low) / step).round() if step > 0 else torch.zeros_like(logs)
            indices.append(index.clamp(0, LEVELS).to(torch.uint8))
        head = torch.frombuffer(bytearray(struct.pack("<4f", *grid)), dtype=torch.uint8)
        return torch.cat([head, *indices])

    @classmethod
    def read(cls, stored: Tensor, rows: int, columns: int) -> "Scales":
        """Inverse of `stored`, on its device; InputError where a grid makes no finite scale."""
        grid = struct.unpack("<4f", bytes(stored[:GRID_BYTES].tolist()))
        found = []
        for (low, step), index in zip((grid[:2], grid[2:]), stored[GRID_BYTES:].split([rows, columns]), strict=True):
            largest = low + LEVELS * step
            if not (-126 <= low <= 127 and 0 <= step and largest <= 127):
                raise InputError("the grid of a weight's scales is impossible: the checkpoint is damaged, get it again")
            found.append(torch.exp2(low + step * index.double()).float())
        return cls(*found)


class CodedWeight(StoredLinear):
    """W = row_scale ∘ codes ∘ column_scale: y = row_scale ∘ (codes (column_scale ∘ x)).

    In files: stream (length,) uint8, the codes (coding/stream.py), and scales (16 + out + in,) uint8 (`Scales`). Loaded
    (`lay_out`): codes (out, in) of the smallest integers that hold them, row_scale (out,) and column_scale (in,); a
    state dict has what the files have. These three are buffers, and only once they are there: accelerate looks for
    every parameter of a layer that it offloads in the state dict.
    """

    name: ClassVar[str] = "coded"
    bias: nn.Parameter | None
    stream: Tensor | None
    scales: Tensor | None
    codes: Tensor | None
    row_scale: Tensor | None
    column_scale: Tensor | None

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.register_buffer("stream", torch.empty(spec.parameters["length"], dtype=torch.uint8))
        size = GRID_BYTES + self.out_features + self.in_features
        self.register_buffer("scales", torch.empty(size, dtype=torch.uint8))
        self._hold(None, None, None)
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if spec.bias else None
        self.register_state_dict_post_hook(_as_stored)
        self.register_load_state_dict_pre_hook(_make_room)

    @classmethod
    def check(cls, spec: Spec) -> None:
        length = spec.parameters.get("length")
        # A stream longer than 32 bits a code and its tables is none that was ever written.
        if type(length) is not int or not 1 <= length <= 2**20 + 5 * spec.shape[0] * spec.shape[1]:
            raise InputError(f"format coded of shape {spec.shape} has a stream of {length!r} bytes: write it again")

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        return cls.beside(spec.shape) + int(spec.parameters["length"]) + added_bias_bytes(spec, element_size)

    @staticmethod
    def beside(shape: tuple[int, int]) -> int:
        """Bytes of the scales."""
        return GRID_BYTES + shape[0] + shape[1]

    @staticmethod
    def encode(codes: Tensor, scales: Scales, bias: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of integer codes (out, in)."""
        stored = {"stream": encode(codes), "scales": scales.stored()}
        return stored if bias is None else {**stored, "bias": bias}

    def touched_bytes(self, rows: int) -> int:
        parts = self.parts()
        bias = [] if self.bias is None else [self.bias]
        return held(*parts, *bias)

    def kernel(self, rows: int) -> str:
        codes, scales, _ = self.parts()
        return "int8 (torch)" if self._takes_integers(rows, scales.dtype, codes) else DENSE_PRODUCT

    def check_indices(self) -> None:
        """Decodes, which finds every damage; see `lay_out`."""
        self.lay_out()

    def lay_out(self) -> None:
        if self.codes is not None or self.stream is None:
            return
        self._hold(*self.parts())
        self.stream = None

    def _hold(self, *tensors: Tensor | None) -> None:
        """Set codes, row_scale and column_scale."""
        for name, tensor in zip(("codes", "row_scale", "column_scale"), tensors, strict=True):
            if hasattr(self, name):
                delattr(self, name)
            if tensor is None:
                setattr(self, name, None)
            else:
                self.register_buffer(name, tensor, persistent=False)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) and the scales of rows and of columns, decoded where they have not been laid out."""
        if self.codes is not None:
            assert self.row_scale is not None
            assert self.column_scale is not None
            return self.codes, self.row_scale, self.column_scale
        assert self.stream is not None
        codes = decode(self.stream, self.spec.shape).to(self.stream.device)
        return codes, *self.stored_scales()

    def stored_scales(self) -> tuple[Tensor, Tensor]:
        """Those of rows and of columns that the files have, in the computing dtype."""
        assert self.scales is not None
        scales = Scales.read(self.scales, self.out_features, self.in_features)
        return scales.rows.to(self.weight.dtype), scales.columns.to(self.weight.dtype)

    def dense(self) -> Tensor:
        codes, rows, columns = self.parts()
        return codes.to(rows.dtype) * rows[:, None] * columns

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        codes, rows, columns = self.parts()
        x = x * columns
        if not torch.is_grad_enabled() and self._takes_integers(x[..., 0].numel(), x.dtype, codes):
            y = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), codes, rows)
            y = y.reshape(*x.shape[:-1], self.out_features)
        else:
            y = nn.functional.linear(x, codes.to(x.dtype)) * rows
        return y if self.bias is None else y + self.bias

    def _takes_integers(self, rows: int, dtype: torch.dtype, codes: Tensor) -> bool:
        """Whether torch's product with int8 weights, which has no gradients, is right and the faster one.

        In bfloat16 it errs where a row is no multiple of 16 (torch 2.13).
        """
        right = codes.dtype == torch.int8 and codes.device.type == "cpu"
        whole = dtype != torch.bfloat16 or self.in_features % 16 == 0
        return right and whole and 0 < rows <= FEW_ROWS


@FORMATS.register
class Coded(CodedWeight, LeafLinear):  # type: ignore[misc]
    """A linear layer of a CodedWeight."""


def _as_stored(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Put what the files have in the place of what was laid out; scales that moved get a grid of their own."""
    assert isinstance(module, CodedWeight)
    if module.codes is None:
        return
    codes, rows, columns = module.parts()
    state[prefix + "stream"] = encode(codes)
    if not all(map(torch.equal, (rows, columns), module.stored_scales())):
        state[prefix + "scales"] = Scales(rows, columns).stored()


def _make_room(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Take a stream again where one is to be loaded."""
    assert isinstance(module, CodedWeight)
    if prefix + "stream" in state and module.codes is not None:
        module.stream = torch.empty_like(state[prefix + "stream"])
        module._hold(None, None, None)
