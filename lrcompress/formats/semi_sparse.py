"""Semi-sparse 2:4: of four neighbouring inputs of a row two have a weight, stored with their 2-bit positions."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.formats.base import FORMATS, RowsLinear, added_bias_bytes
from lrcompress.kernels.products import pairs
from lrcompress.kernels.rows import KEPT, PLACE_BITS, WIDTH, PairRows
from lrcompress.linalg.packing import pack, packed_length
from lrcompress.protocols import Spec

PATTERN = "2:4"


@FORMATS.register
class SemiSparse(RowsLinear):
    """values: (out, 2 quads) kept weights in the order of their columns, positions: their places in 0..3, packed.

    A row whose length is no multiple of 4 is padded: positions may then lie behind its end, with a value of 0.
    """

    name: ClassVar[str] = "semi_sparse"
    positions: Tensor

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.quads = -(-self.in_features // WIDTH)
        self.values = nn.Parameter(torch.empty(self.out_features, KEPT * self.quads, dtype=dtype))
        places = packed_length(KEPT * self.quads, PLACE_BITS)
        self.register_buffer("positions", torch.empty(self.out_features, places, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if spec.bias else None

    @classmethod
    def check(cls, spec: Spec) -> None:
        pattern = spec.parameters.get("pattern")
        if pattern != PATTERN:
            raise InputError(f"format semi_sparse has the pattern {pattern!r}: {PATTERN} is possible")

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        kept = KEPT * -(-spec.shape[1] // WIDTH)
        row = kept * element_size + packed_length(kept, PLACE_BITS)
        return spec.shape[0] * row + added_bias_bytes(spec, element_size)

    @classmethod
    def encode(cls, weight: Tensor, mask: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Stored tensors of weight (out, in) where mask (out, in) is true, at most two in every four columns."""
        padding = -weight.shape[1] % WIDTH
        weights, kept = (
            nn.functional.pad(t, (0, padding)).unflatten(1, (-1, WIDTH)) for t in (weight.float() * mask, mask)
        )
        # Kept places come first, in ascending order; a stable sort fills up with the first of the others.
        positions = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :KEPT].sort(dim=-1).values
        stored = {
            "values": weights.gather(-1, positions).flatten(1),
            "positions": pack(positions.flatten(1), PLACE_BITS),
        }
        return stored if bias is None else {**stored, "bias": bias}

    def check_indices(self) -> None:
        if not bool((self.stored_rows().places(0, self.out_features).diff(dim=-1) > 0).all()):
            raise self.refuse_index("positions", "two ascending places in every four columns")

    def stored_rows(self) -> PairRows:
        return PairRows(self.values, self.positions, self.in_features)

    def product(self, x: Tensor) -> Tensor:
        return pairs(x, self.stored_rows())

    def dense_bias(self) -> Tensor | None:
        return self.bias


def top_two(scores: Tensor) -> Tensor:
    """Mask (out, in) of the two largest finite scores (out, in) in every four columns; the first of equal ones."""
    padding = -scores.shape[1] % WIDTH
    padded = nn.functional.pad(scores, (0, padding), value=-torch.inf).unflatten(1, (-1, WIDTH))
    order = padded.argsort(dim=-1, descending=True, stable=True)[..., :KEPT]
    mask = torch.zeros_like(padded, dtype=torch.bool).scatter(-1, order, torch.ones_like(order, dtype=torch.bool))
    return mask.flatten(1)[:, : scores.shape[1]]
