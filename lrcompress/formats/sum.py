"""Sum: a base in any other format and a low-rank correction of what it gets wrong."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.formats.base import (
    FORMATS,
    FactorPair,
    KernelLinear,
    StoredLinear,
    added_bias_bytes,
    build,
    check_rank,
    decoded_bytes,
    held,
    trains,
)
from lrcompress.formats.low_rank import LowRank
from lrcompress.kernels.products import quantized, way
from lrcompress.kernels.rows import QuantizedRows
from lrcompress.linalg.packing import pack, packed_length, unpack
from lrcompress.linalg.rounding import storable, symmetric_codes
from lrcompress.precision import widened
from lrcompress.protocols import Spec

FACTOR_BITS = (16, 8, 4)
"""16 stands for the checkpoint's own dtype."""


@FORMATS.register
class Sum(StoredLinear):
    """y = base(x) + B (A x) + b; the base's tensors lie under `base.`, the bias is the sum's own.

    16-bit factors are A (r, in) and B (out, r), named as in low_rank. With fewer bits they are signed codes,
    `A_codes` (r, bytes of in) and `B_codes` (r, bytes of out), uint8, and `scale` (r,): component i of the
    correction is scale_i b_i a_iᵀ with a and b = code / 2^(bits-1) - 1, at most 1 in size.
    """

    name: ClassVar[str] = "sum"
    A_codes: Tensor
    B_codes: Tensor

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.base = build(part(spec, "base"), dtype)
        # The sum's own `weight` stands for the dense parameter; the base's, which PEFT looks at, is not stored.
        self.base.register_buffer("weight", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)
        self.rank, self.bits = spec.parameters["correction"]["rank"], spec.parameters["correction"]["bits"]
        if self.bits == 16:
            self.A = KernelLinear(self.in_features, self.rank, bias=False, dtype=dtype)
            self.B = KernelLinear(self.rank, self.out_features, bias=False, dtype=dtype)
        else:
            for name, width in (("A_codes", self.in_features), ("B_codes", self.out_features)):
                shape = (self.rank, packed_length(width, self.bits))
                self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))
            self.scale = nn.Parameter(torch.empty(self.rank, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if spec.bias else None

    @classmethod
    def check(cls, spec: Spec) -> None:
        for key in ("base", "correction"):
            entry = spec.parameters.get(key)
            if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
                raise InputError(f"format sum has the {key} {entry!r}: a mapping with its format is needed")
        base, correction = part(spec, "base"), part(spec, "correction")
        if base.format == cls.name or correction.format != LowRank.name:
            raise InputError(f"format sum of {base.format} and {correction.format}: its correction is {LowRank.name}")
        FORMATS.get(base.format).check(base)
        check_rank(correction)
        bits = correction.parameters.get("bits")
        if type(bits) is not int or bits not in FACTOR_BITS:
            raise InputError(
                f"format sum has factors of {bits!r} bits: {', '.join(map(str, FACTOR_BITS))} are possible"
            )

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        base, correction = part(spec, "base"), spec.parameters["correction"]
        if correction["bits"] == 16:
            component = sum(spec.shape) * element_size
        else:
            component = sum(packed_length(n, correction["bits"]) for n in spec.shape) + element_size
        total = FORMATS.get(base.format).bytes(base, element_size) + correction["rank"] * component
        return total + added_bias_bytes(spec, element_size)

    @classmethod
    def multiplies(cls, spec: Spec) -> int:
        base = part(spec, "base")
        return FORMATS.get(base.format).multiplies(base) + int(spec.parameters["correction"]["rank"]) * sum(spec.shape)

    @classmethod
    def encode(
        cls, base: dict[str, Tensor], left: Tensor, right: Tensor, bits: int, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """Stored tensors of the base's tensors and left (m, r) @ right (r, n) in factors of `bits` bits."""
        stored = {f"base.{key}": tensor for key, tensor in base.items()}
        if bits == 16:
            stored |= LowRank.encode(left, right, None)
        else:
            a, b, scale = component_codes(left, right, bits)
            half = 2 ** (bits - 1)
            stored |= {"A_codes": pack(a + half, bits), "B_codes": pack(b + half, bits), "scale": scale.float()}
        return stored if bias is None else {**stored, "bias": bias}

    def check_indices(self) -> None:
        self.base.check_indices()

    def factor_pair(self) -> FactorPair | None:
        return FactorPair("B.weight", "A.weight") if self.bits == 16 else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r), the components' scales included, and A (r, in)."""
        if self.bits == 16:
            return self.B.weight, self.A.weight
        a, b = self._signed(self.A_codes, self.in_features), self._signed(self.B_codes, self.out_features)
        return b.T * self.scale, a

    def _signed(self, packed: Tensor, count: int) -> Tensor:
        half = 2 ** (self.bits - 1)
        return unpack(packed, self.bits, count).to(self.scale.dtype) / half - 1

    def dense(self) -> Tensor:
        left, right = self.factors()
        return self.base.dense() + left @ right

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == 16:
            y: Tensor = self.base(x) + self.B(self.A(x))
        elif trains(self.scale):
            left, right = self.factors()
            y = self.base(x) + nn.functional.linear(nn.functional.linear(x, right), left)
        else:
            a, b = self._code_rows()
            y = self.base(x) + quantized(quantized(x, a) * self.scale, b, transposed=True)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _code_rows(self) -> tuple[QuantizedRows, QuantizedRows]:
        """The signed codes of A (r, in) and of Bᵀ (r, out), as the kernels read them."""
        half = 2 ** (self.bits - 1)
        zeros = self.A_codes.new_full((self.rank, 1), half)
        scale = self.scale.new_full((self.rank, 1), 1 / half, requires_grad=False)
        sides = ((self.A_codes, self.in_features), (self.B_codes, self.out_features))
        right, left = (QuantizedRows(codes, zeros, scale, self.bits, width, width) for codes, width in sides)
        return right, left

    def multiply_adds(self, rows: int) -> int:
        return self.base.multiply_adds(rows) + self.rank * (self.in_features + self.out_features)

    def kernel(self, rows: int) -> str:
        own = self.B.kernel(rows) if self.bits == 16 else way(self._code_rows()[0], rows, self.scale.dtype)
        return f"{self.base.kernel(rows)}; correction: {own}"

    def touched_bytes(self, rows: int) -> int:
        own = held(*(t for name, t in self.state_dict().items() if not name.startswith("base.")))
        if self.bits < 16:
            own += sum(decoded_bytes(codes, rows) for codes in self._code_rows())
        return self.base.touched_bytes(rows) + own


def part(spec: Spec, key: str) -> Spec:
    """The spec of the sum's `base` or `correction`, which have neither a bias nor a layout of their own."""
    parameters: dict[str, Any] = dict(spec.parameters[key])
    return Spec(parameters.pop("format"), spec.shape, parameters=parameters)


def component_codes(left: Tensor, right: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes a (r, n) and b (r, m) and scales (r,) of the components of left (m, r) @ right (r, n).

    Component i is scale_i b_i a_iᵀ / 4^(bits-1); it does not depend on the others, so any first r can be stored.
    """
    a, a_scale = symmetric_codes(widened(right), bits)
    b, b_scale = symmetric_codes(widened(left).T, bits)
    scale = storable((a_scale * b_scale).flatten() * 4.0 ** (bits - 1))
    return a.to(torch.int32), b.to(torch.int32), scale


def rounded_factors(left: Tensor, right: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """left (m, r) and right (r, n) as they multiply once stored in `bits` bits, wide; 16 bits change nothing."""
    if bits == 16:
        return widened(left), widened(right)
    a, b, scale = component_codes(left, right, bits)
    return b.T * (scale / 4.0 ** (bits - 1)), widened(a)
