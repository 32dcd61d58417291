"""Coded: integer codes through an entropy coder, a scale for every row and every column."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.coding import decode, encode, energies
from lrcompress.errors import InputError
from lrcompress.formats.base import FORMATS, LeafLinear, StoredLinear, added_bias_bytes, held
from lrcompress.kernels import tiled_products, tiles
from lrcompress.kernels.products import DENSE_PRODUCT
from lrcompress.kernels.tiles import Tiles
from lrcompress.kernels.tracing import in_autocast
from lrcompress.protocols import Spec

GRID_BYTES = 16
"""Four little-endian float32: of rows, then of columns, the log2 of the smallest scale and the step between two."""

FEW_ROWS = 4
"""Up to so many rows torch's product with int8 weights is faster than one with codes that are converted first: a row of
bfloat16 with 8192 x 2048 codes takes 0.46 ms instead of 22, 16 rows of float32 3 times as long."""

LEVELS = 255
"""Largest index of a scale."""

TILES, PANELS, INT8 = "tiles", "tiles, by panels", "int8 (torch)"
"""What multiplies, see `CodedWeight.kernel`."""


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
        return cls.read(cls(rows.float(), columns.float()).stored().to(rows.device), len(rows), len(columns))

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
        return cls(*tiles.scales(cls.levels(stored), stored[GRID_BYTES:], (rows, columns)))

    @staticmethod
    def levels(stored: Tensor) -> Tensor:
        """The points of both grids (2, 256), float32 as int32 (kernels/tiles.py); InputError as `read`."""
        grid = struct.unpack("<4f", bytes(stored[:GRID_BYTES].tolist()))
        points = torch.arange(LEVELS + 1, dtype=torch.float64)
        for low, step in (grid[:2], grid[2:]):
            if not (-126 <= low <= 127 and 0 <= step and low + LEVELS * step <= 127):
                raise InputError("the grid of a weight's scales is impossible: the checkpoint is damaged, get it again")
        return (
            torch.stack([torch.exp2(low + step * points) for low, step in (grid[:2], grid[2:])])
            .float()
            .view(torch.int32)
            .to(stored.device)
        )


class CodedWeight(StoredLinear):
    """W = row_scale ∘ codes ∘ column_scale: y = row_scale ∘ (codes (column_scale ∘ x)).

    In files: stream (length,) uint8, the codes (coding/stream.py), and scales (16 + out + in,) uint8 (`Scales`). Loaded
    (`lay_out`): `levels` of the scales, and the codes as tiles (kernels/tiles.py), or where there can be none as codes
    (out, in) of the smallest integers that hold them; a state dict has what the files have. These are buffers, and
    only once they are there: accelerate looks for every parameter of a layer that it offloads in the state dict.
    While scales are trained (`train_scales`), `row_gain` (out,) and `column_gain` (in,) multiply them.
    """

    name: ClassVar[str] = "coded"
    bias: nn.Parameter | None
    scales: Tensor
    stream: Tensor | None
    levels: Tensor | None
    codes: Tensor | None
    row_gain: nn.Parameter | None
    column_gain: nn.Parameter | None
    copies_output = False  # so that it may be changed in place while gains are trained, whose gradient reads it

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.register_buffer("stream", torch.empty(spec.parameters["length"], dtype=torch.uint8))
        size = GRID_BYTES + self.out_features + self.in_features
        self.register_buffer("scales", torch.empty(size, dtype=torch.uint8))
        self._hold({})
        self.register_parameter("row_gain", None)
        self.register_parameter("column_gain", None)
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
        read = [self.scales, *self._laid_out().values(), *([] if self.bias is None else [self.bias])]
        decoded = 2 * self.out_features * self.in_features * self.weight.itemsize
        return held(*read) + (0 if self.kernel(rows) in (TILES, INT8) else decoded)

    def kernel(self, rows: int) -> str:
        own = self._laid_out()
        if "codes" not in own:
            return TILES if rows <= tiles.FEW else PANELS
        return INT8 if self._takes_integers(rows, self.weight.dtype, own["codes"]) else DENSE_PRODUCT

    def check_indices(self) -> None:
        """Decodes, which finds every damage; see `lay_out`."""
        self.lay_out()

    def lay_out(self) -> None:
        if self.stream is not None:
            packed = self._packed()
            own = self._laid_out() if packed is None else {**packed._asdict(), "levels": Scales.levels(self.scales)}
            self._hold(own)
            self.stream = None

    def train_scales(self) -> None:
        """Multiply the scales by parameters in float32 that begin at one, so that they move by fractions."""
        for name, count in (("row_gain", self.out_features), ("column_gain", self.in_features)):
            setattr(self, name, nn.Parameter(torch.ones(count, device=self.scales.device)))

    def stored_scales(self) -> Scales:
        """Those of the files, float32."""
        return Scales.read(self.scales, self.out_features, self.in_features)

    def trained_scales(self) -> Scales:
        """With the gains, which `train_scales` has made."""
        assert self.row_gain is not None
        assert self.column_gain is not None
        own = self.stored_scales()
        return Scales(own.rows * self.row_gain, own.columns * self.column_gain)

    def _packed(self) -> Tiles | None:
        """Tiles of the stream, decoded a block of rows at a time; None where there can be none."""
        assert self.stream is not None
        if self.stream.device.type != "cpu":
            return None
        return tiles.pack(self.spec.shape, energies(self.stream, self.spec.shape), self._decoded)

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Set levels and either codes or what tiles are."""
        for name in ("levels", "codes", *Tiles._fields):
            if hasattr(self, name):
                delattr(self, name)
            if name in tensors:
                self.register_buffer(name, tensors[name], persistent=False)
            else:
                setattr(self, name, None)

    def _laid_out(self) -> dict[str, Tensor]:
        """Levels and codes or tiles by name; codes that are decoded now where nothing has been laid out."""
        if self.stream is None:
            return {k: v for k in ("levels", "codes", *Tiles._fields) if (v := getattr(self, k)) is not None}
        codes = self._decoded(slice(None)).to(self.stream.device)
        return {"levels": Scales.levels(self.scales), "codes": codes}

    def _decoded(self, rows: slice) -> Tensor:
        assert self.stream is not None
        return decode(self.stream, self.spec.shape, rows)

    def integers(self) -> Tensor:
        """The codes (out, in)."""
        own = self._laid_out()
        return own["codes"] if "codes" in own else tiles.codes(_tiles(own))

    def dense(self) -> Tensor:
        weight = self._stored_weight()
        if self.row_gain is None:
            return weight
        assert self.column_gain is not None
        return (weight * self.row_gain[:, None] * self.column_gain).to(weight.dtype)

    def _stored_weight(self) -> Tensor:
        own = self._laid_out()
        if "codes" not in own:
            return tiles.dense(_tiles(own), own["levels"], self.scales[GRID_BYTES:], self.weight.dtype)
        rows, columns = self._scales(own, self.weight.dtype)
        return own["codes"].to(rows.dtype) * rows[:, None] * columns

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def _scales(self, own: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows, columns = tiles.scales(own["levels"], self.scales[GRID_BYTES:], self.spec.shape)
        return rows.to(dtype), columns.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        own, x = self._laid_out(), in_autocast(x)
        if "codes" not in own:
            levels, indices, gains = own["levels"], self.scales[GRID_BYTES:], (self.row_gain, self.column_gain)
            y = tiled_products.linear(x, _tiles(own), levels, indices, gains)
            y = y.clone() if self.copies_output else y
        elif self.row_gain is None or self.column_gain is None:
            y = self._whole_product(x, own)
        else:
            y = (self._whole_product((x * self.column_gain).to(x.dtype), own) * self.row_gain).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def rows(self, wanted: Tensor) -> Tensor:
        """Rows (..., in) of the weight for integers (...)."""
        found = self._stored_rows(wanted)
        if self.row_gain is None:
            return found
        assert self.column_gain is not None
        return (found * self.row_gain[wanted][..., None] * self.column_gain).to(found.dtype)

    def _stored_rows(self, wanted: Tensor) -> Tensor:
        own = self._laid_out()
        if "codes" not in own:
            return tiles.rows_of(wanted, _tiles(own), own["levels"], self.scales[GRID_BYTES:], self.weight.dtype)
        rows, columns = self._scales(own, self.weight.dtype)
        return own["codes"][wanted].to(rows.dtype) * rows[wanted][..., None] * columns

    def _whole_product(self, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        codes, (rows, columns) = own["codes"], self._scales(own, x.dtype)
        x = x * columns
        if not torch.is_grad_enabled() and self._takes_integers(x[..., 0].numel(), x.dtype, codes):
            y = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), codes, rows)
            return y.reshape(*x.shape[:-1], self.out_features)
        return nn.functional.linear(x, codes.to(x.dtype)) * rows

    def _takes_integers(self, rows: int, dtype: torch.dtype, codes: Tensor) -> bool:
        """Whether torch's product with int8 weights, which has no gradients, is right and the faster one.

        In bfloat16 it errs where a row is no multiple of 16 (torch 2.13).
        """
        right = codes.dtype == torch.int8 and codes.device.type == "cpu"
        whole = dtype != torch.bfloat16 or self.in_features % 16 == 0
        return right and whole and 0 < rows <= FEW_ROWS


def _tiles(own: Mapping[str, Tensor]) -> Tiles:
    return Tiles(*(own[name] for name in Tiles._fields))


@FORMATS.register
class Coded(CodedWeight, LeafLinear):  # type: ignore[misc]
    """A linear layer of a CodedWeight."""


def _as_stored(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Put what the files have in the place of what was laid out."""
    assert isinstance(module, CodedWeight)
    if module.row_gain is not None:
        del state[prefix + "row_gain"], state[prefix + "column_gain"]
        state[prefix + "scales"] = module.trained_scales().stored().to(module.scales.device)
    if module.stream is None:
        state[prefix + "stream"] = encode(module.integers())


def _make_room(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Take a stream again where one is to be loaded."""
    assert isinstance(module, CodedWeight)
    if prefix + "stream" in state and module.stream is None:
        module.stream = torch.empty_like(state[prefix + "stream"])
        module._hold({})
