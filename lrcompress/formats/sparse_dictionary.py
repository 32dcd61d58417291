"""Sparse dictionary: W ≈ S D with a dense dictionary and exactly s coefficients per output (CoSpaDi, 2509.22075)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.formats.base import (
    FORMATS,
    StoredLinear,
    added_bias_bytes,
    check_rank,
    decoded_bytes,
    held,
    index_dtype,
    trains,
)
from lrcompress.kernels.products import GATHER_COLUMNS, GATHERED, linear, quantized, sparse, way
from lrcompress.kernels.rows import QuantizedRows, SparseRows
from lrcompress.linalg.packing import pack_bits
from lrcompress.protocols import Spec

BITS = (8, 16)


@FORMATS.register
class SparseDictionary(StoredLinear):
    """y = S (D x) + b with `dictionary` D (k, in) and `coefficients` (out, s), the nonzeros of S (out, k) by row.

    `positions` says where they are, in ascending order: a mask of out * k bits, packed eight to a byte, or (out, s)
    indices, whichever is smaller. With 8 bits a factor is int8 with a scale per row.

    Where the spec names a module in `shared`, D is that module's: this one has none, until it is told to `follow` it.
    """

    name: ClassVar[str] = "sparse_dictionary"
    dictionary: Tensor
    coefficients: Tensor
    positions: Tensor

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        atoms, nonzeros = _sizes(spec)
        self._owner: tuple[SparseDictionary, ...] = ()
        if spec.owner is None:
            self._declare("dictionary", (atoms, self.in_features), _bits(spec, "dictionary_bits"), dtype)
        self._declare("coefficients", (self.out_features, nonzeros), _bits(spec, "coefficient_bits"), dtype)
        shape, kind = _positions(spec)
        self.register_buffer("positions", torch.empty(shape, dtype=kind))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if spec.bias else None

    def _declare(self, name: str, shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
        if bits == 16:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))
        else:
            self.register_buffer(name, torch.empty(shape, dtype=torch.int8))
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.empty(shape[0], dtype=dtype)))

    @classmethod
    def check(cls, spec: Spec) -> None:
        atoms = spec.parameters.get("atoms")
        if not isinstance(atoms, int) or isinstance(atoms, bool) or not 1 <= atoms <= spec.shape[0]:
            raise InputError(
                f"format {spec.format} of shape {spec.shape} has {atoms!r} atoms: 1 to {spec.shape[0]} are possible"
            )
        check_rank(spec, largest=atoms)
        for key in ("dictionary_bits", "coefficient_bits"):
            bits = spec.parameters.get(key, 16)
            if type(bits) is not int or bits not in BITS:
                raise InputError(f"format {spec.format} has {key} {bits!r}: 8 and 16 are possible")

    @classmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        (m, n), (atoms, nonzeros) = spec.shape, _sizes(spec)
        shape, kind = _positions(spec)
        total = kind.itemsize * torch.Size(shape).numel() + added_bias_bytes(spec, element_size)
        parts = [(m, nonzeros, "coefficient_bits")]
        if spec.owner is None:
            parts.append((atoms, n, "dictionary_bits"))
        for rows, width, key in parts:
            total += rows * (width + element_size if _bits(spec, key) == 8 else width * element_size)
        return total

    @classmethod
    def multiplies(cls, spec: Spec) -> int:
        (m, n), (atoms, nonzeros) = spec.shape, _sizes(spec)
        return atoms * n + m * (nonzeros if product(spec) == "sparse" else atoms)

    @classmethod
    def encode(
        cls, spec: Spec, dictionary: Tensor, codes: Tensor, support: Tensor, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """Stored tensors of codes (out, k), read on support (out, k) bool with s true per row, @ dictionary (k, in)."""
        nonzeros = spec.parameters["rank"]
        index = support.nonzero()[:, 1].reshape(len(support), nonzeros)
        stored = {
            **_named("coefficients", quantised(codes.gather(1, index), _bits(spec, "coefficient_bits"))),
            "positions": pack_bits(support) if _masked(spec) else index.to(_positions(spec)[1]),
        }
        if spec.owner is None:
            stored |= _named("dictionary", quantised(dictionary, _bits(spec, "dictionary_bits")))
        return stored if bias is None else {**stored, "bias": bias}

    def check_indices(self) -> None:
        atoms, nonzeros = _sizes(self.spec)
        if _masked(self.spec):
            sound = bool((self._code_rows.support(0, self.out_features).sum(1) == nonzeros).all())
            wanted = f"a mask of {nonzeros} of {atoms} atoms in every row"
        else:
            index = self.positions.long()
            sound = bool((index[:, 0] >= 0).all() and (index[:, -1] < atoms).all() and (index.diff(dim=1) > 0).all())
            wanted = f"{nonzeros} ascending numbers from 0 to {atoms - 1} in every row"
        if not sound:
            raise self.refuse_index("positions", wanted)

    def follow(self, owner: StoredLinear) -> None:
        """In a tuple, so that the owner is no submodule, is copied with the model, and may be moved and trained."""
        if not isinstance(owner, SparseDictionary) or not _same_dictionary(self.spec, owner.spec):
            raise InputError(f"the manifest shares a dictionary of {self.spec} that {owner.spec} cannot have")
        self._owner = (owner,)

    def whole_state(self) -> dict[str, Tensor]:
        names = ("dictionary", "dictionary_scale")
        shared = {k: t for k, t in self._source().state_dict().items() if k in names}
        return {**self.state_dict(), **shared}

    def _source(self) -> "SparseDictionary":
        """The module that stores the dictionary."""
        if self.spec.owner is None:
            return self
        if not self._owner:
            raise RuntimeError(f"the dictionary lies in {self.spec.owner}: call follow with that module first")
        return self._owner[0]

    def _dictionary(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """D (k, in) as it is stored, and the scales of its rows, on the device of `like`."""
        source = self._source()
        if source is not self and source.coefficients.is_meta and hasattr(source, "_hf_hook"):
            from accelerate.utils import align_module_device

            with align_module_device(source, like.device):  # offloaded: back on the meta device afterwards
                parts = source.dictionary.clone(), getattr(source, "dictionary_scale", None)
                return parts[0], None if parts[1] is None else parts[1].clone()
        scale = getattr(source, "dictionary_scale", None)
        return source.dictionary.to(like.device), None if scale is None else scale.to(like.device)

    def atoms_of(self, x: Tensor) -> Tensor:
        """D (k, in), dense, on the device of x."""
        return dequantised(self._dictionary(x))

    @property
    def _code_rows(self) -> SparseRows:
        """S (out, k), as the kernels read it."""
        scale = getattr(self, "coefficients_scale", None)
        return SparseRows(self.coefficients, scale, self.positions, self.spec.parameters["atoms"])

    def codes(self) -> Tensor:
        """S (out, k), dense, in the factors' dtype."""
        return self._code_rows.numbers(0, self.out_features)

    def dense(self) -> Tensor:
        codes = self.codes()
        return codes @ self.atoms_of(codes)

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def forward(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        """x (..., in) to (..., out); `transposed`: x (..., out) to (..., in), by Wᵀ and without the bias."""
        codes, learnt = self._code_rows, trains(self.coefficients, getattr(self, "coefficients_scale", None))
        if transposed:
            return self._by_dictionary(x @ self.codes() if learnt else sparse(x, codes, transposed=True), transposed)
        latent = self._by_dictionary(x, transposed)
        if learnt:
            return nn.functional.linear(latent, self.codes(), self.bias)
        y = sparse(latent, codes)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _by_dictionary(self, x: Tensor, transposed: bool) -> Tensor:
        """x (..., in) Dᵀ; transposed: x (..., k) D."""
        values, scale = self._dictionary(x)
        if scale is not None and not trains(scale):
            return quantized(x, self._quantised(values, scale), transposed=transposed)
        dictionary = dequantised((values, scale))
        return linear(x, dictionary, transposed=transposed)

    def _quantised(self, values: Tensor, scale: Tensor) -> QuantizedRows:
        """D in int8, as the kernels read it."""
        return QuantizedRows(values, None, scale[:, None], 8, self.in_features, self.in_features)

    def kernel(self, rows: int, *, transposed: bool = False) -> str:
        return way(self._code_rows, rows, self._code_rows.dtype, transposed=transposed)

    def multiply_adds(self, rows: int) -> int:
        atoms, nonzeros = _sizes(self.spec)
        return atoms * self.in_features + self.out_features * (nonzeros if self.kernel(rows) == GATHERED else atoms)

    def touched_bytes(self, rows: int, *, transposed: bool = False) -> int:
        values, scale = self._dictionary(self.positions)
        shared = [t for t in (values, scale) if t is not None and self.spec.owner is not None]
        total = held(*self.state_dict().values(), *shared) + decoded_bytes(self._code_rows, rows, transposed=transposed)
        return total if scale is None else total + decoded_bytes(self._quantised(values, scale), rows, transposed=True)


def product(spec: Spec) -> str:
    """How S is multiplied: `dense`, or `sparse` for many rows, in float32, on a processor, without gradients."""
    atoms, nonzeros = _sizes(spec)
    return "sparse" if atoms >= GATHER_COLUMNS * nonzeros else "dense"


def _sizes(spec: Spec) -> tuple[int, int]:
    """Atoms k and coefficients per output s."""
    return spec.parameters["atoms"], spec.parameters["rank"]


def _bits(spec: Spec, key: str) -> int:
    return int(spec.parameters.get(key, 16))


def _same_dictionary(spec: Spec, owner: Spec) -> bool:
    """Whether the dictionary that `owner` stores is of the size and the bits that `spec` has."""
    same = spec.shape[1] == owner.shape[1] and _sizes(spec)[0] == _sizes(owner)[0]
    return same and owner.owner is None and _bits(spec, "dictionary_bits") == _bits(owner, "dictionary_bits")


def _masked(spec: Spec) -> bool:
    """Whether positions are a bit mask; at equal size they are."""
    atoms, nonzeros = _sizes(spec)
    return (spec.shape[0] * atoms + 7) // 8 <= spec.shape[0] * nonzeros * index_dtype(atoms).itemsize


def _positions(spec: Spec) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of `positions`."""
    atoms, nonzeros = _sizes(spec)
    if _masked(spec):
        return ((spec.shape[0] * atoms + 7) // 8,), torch.uint8
    return (spec.shape[0], nonzeros), index_dtype(atoms)


def quantised(values: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """`values` (rows, width) as they are, or as int8 with the scale (rows,) of every row.

    A scale is rounded to bfloat16 before it is used, so that it is stored exactly in any dtype of 16 bits.
    """
    if bits == 16:
        return values, None
    scale = (values.abs().amax(1) / 127).bfloat16().to(values.dtype)
    safe = torch.where(scale > 0, scale, 1.0)
    return (values / safe[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantised(stored: tuple[Tensor, Tensor | None]) -> Tensor:
    """The numbers that `quantised` stands for, in the scale's dtype."""
    values, scale = stored
    return values if scale is None else values.to(scale.dtype) * scale[:, None]


def _named(name: str, stored: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
    values, scale = stored
    return {name: values} if scale is None else {name: values, f"{name}_scale": scale}
