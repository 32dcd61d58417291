"""Sparse dictionary: W ≈ S D with a dense dictionary and exactly s coefficients per output (CoSpaDi, 2509.22075)."""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.formats.base import FORMATS, StoredLinear, added_bias_bytes, check_rank, held, index_dtype
from lrcompress.protocols import Spec

BITS = (8, 16)

SPARSE_ATOMS, SPARSE_ROWS = 3, 32
"""From so many atoms per coefficient, and rows of the input, on the sparse product is taken on a processor: twice
as fast at 3 atoms and 128 rows, three times at 4; see benchmarks/sparse_product.py. One row is faster dense."""


@FORMATS.register
class SparseDictionary(StoredLinear):
    """y = S (D x) + b with `dictionary` D (k, in) and `coefficients` (out, s), the nonzeros of S (out, k) by row.

    `positions` says where they are, in ascending order: a mask of out * k bits, packed eight to a byte, or (out, s)
    indices, whichever is smaller. With 8 bits a factor is int8 with a scale per row. Without gradients S is decoded
    once and kept until a tensor that it is made of changes; see `product` for how it is multiplied.

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
        self._decoded: dict[str, tuple[list[weakref.ref[Tensor]], list[tuple[int, int]], Tensor]] = {}

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
            sound = bool((self._support().sum(1) == nonzeros).all())
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

    def atoms_of(self, x: Tensor) -> Tensor:
        """D (k, in) on the device of x."""
        source = self._source()
        if source is not self and source.coefficients.is_meta and hasattr(source, "_hf_hook"):
            from accelerate.utils import align_module_device

            with align_module_device(source, x.device):  # offloaded: back on the meta device afterwards
                return source._values("dictionary").clone()
        return source._values("dictionary").to(x.device)

    @property
    def product(self) -> str:
        """How S is multiplied: `dense`, or `sparse` for many rows, in float32, on a processor, without gradients."""
        return product(self.spec)

    def codes(self) -> Tensor:
        """S (out, k), dense, in the factors' dtype."""
        values = self._values("coefficients")
        dense = values.new_zeros(self.out_features, self.spec.parameters["atoms"])
        if _masked(self.spec):
            return dense.masked_scatter(self._support(), values)
        return dense.scatter(1, self.positions.long(), values)

    def atoms(self) -> Tensor:
        """(out, s) int32: the atom of every coefficient."""
        if _masked(self.spec):
            return self._support().nonzero()[:, 1].reshape(self.out_features, -1).int()
        return self.positions.int()

    def _support(self) -> Tensor:
        return unpack_bits(self.positions, self.out_features, self.spec.parameters["atoms"])

    def _values(self, name: str) -> Tensor:
        return dequantised((getattr(self, name), getattr(self, f"{name}_scale", None)))

    def dense(self) -> Tensor:
        codes = self.codes()
        return codes @ self.atoms_of(codes)

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def forward(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        """x (..., in) to (..., out); `transposed`: x (..., out) to (..., in), by Wᵀ and without the bias."""
        if transposed:
            return x @ self.decoded_codes() @ self.atoms_of(x)
        latent = nn.functional.linear(x, self.atoms_of(x))
        if _infers() and self._is_faster_sparse(latent[..., 0].numel(), latent):
            return self._sparse_product(latent)
        return nn.functional.linear(latent, self.decoded_codes(), self.bias)

    def decoded_codes(self) -> Tensor:
        """`codes`; without gradients those decoded before, as long as they hold."""
        return self._kept("codes", self.codes) if _infers() else self.codes()

    def _is_faster_sparse(self, rows: int, latent: Tensor) -> bool:
        fits = latent.device.type == "cpu" and latent.dtype == torch.float32
        return fits and self.product == "sparse" and rows >= SPARSE_ROWS

    def multiply_adds(self, rows: int) -> int:
        atoms, nonzeros = _sizes(self.spec)
        sparse = self._is_faster_sparse(rows, self._scales())
        return atoms * self.in_features + self.out_features * (nonzeros if sparse else atoms)

    def touched_bytes(self, rows: int) -> int:
        (atoms, nonzeros), element = _sizes(self.spec), self._scales().itemsize
        source = self._source()
        total = held(source.dictionary, *(t for n, t in source.named_parameters() if n == "dictionary_scale"))
        total += 2 * atoms * self.in_features * element * (_bits(self.spec, "dictionary_bits") == 8)
        if self._is_faster_sparse(rows, self._scales()):
            total += held(self.coefficients) + self.out_features * nonzeros * torch.int32.itemsize
            if _bits(self.spec, "coefficient_bits") == 8:
                total += held(self._scales()) + 2 * self.out_features * nonzeros * element
        else:
            total += self.out_features * atoms * element  # decoded once and kept
        return total + (0 if self.bias is None else held(self.bias))

    def _scales(self) -> Tensor:
        """A tensor of the dtype that is computed in."""
        scale: Tensor | None = getattr(self, "coefficients_scale", None)
        return self.coefficients if scale is None else scale

    def _sparse_product(self, latent: Tensor) -> Tensor:
        """latent (..., k) to (..., out): every output sums the s rows of latentᵀ that it uses."""
        rows = latent.flatten(0, -2).T.contiguous()
        found = nn.functional.embedding_bag(
            self._kept("atoms", self.atoms), rows, per_sample_weights=self._values("coefficients"), mode="sum"
        ).T
        found = found if self.bias is None else found + self.bias
        return found.reshape(*latent.shape[:-1], self.out_features)

    def _kept(self, what: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, remembered as long as the tensors that it depends on are the same and unchanged."""
        sources = [self.positions, self.coefficients, getattr(self, "coefficients_scale", None)]
        tensors = [t for t in sources if t is not None]
        if any(t.is_inference() for t in tensors):  # these count no versions
            return make()
        entry = self._decoded.get(what)
        versions = [(t._version, t.data_ptr()) for t in tensors]
        if entry is None or any(r() is not t for r, t in zip(entry[0], tensors, strict=True)) or entry[1] != versions:
            # Weak references, so that nothing outlives weights that are moved out of memory between calls.
            entry = [weakref.ref(t, self._forget) for t in tensors], versions, make()
            self._decoded[what] = entry
        return entry[2]

    def _forget(self, _: Any = None) -> None:
        self._decoded.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> "SparseDictionary":
        self._forget()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> "SparseDictionary":
        """As every module; forgets what was decoded."""
        self._forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": {}}


def _infers() -> bool:
    """Whether what is decoded may be kept: no gradients are wanted and nothing is being traced."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def product(spec: Spec) -> str:
    """See SparseDictionary.product."""
    atoms, nonzeros = _sizes(spec)
    return "sparse" if atoms >= SPARSE_ATOMS * nonzeros else "dense"


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


def pack_bits(mask: Tensor) -> Tensor:
    """(ceil(numel / 8),) uint8: the bool mask in row-major order, the first bit lowest; the last byte is filled up."""
    bits = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) bool; inverse of `pack_bits`."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] & weights) > 0
    return bits.flatten()[: rows * columns].reshape(rows, columns)
