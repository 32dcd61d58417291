"""What every stored format offers; a new format is one file beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.kernels.products import COMPILED, DENSE_PRODUCT, GATHERED, linear, way
from lrcompress.kernels.rows import NumberRows, Rows
from lrcompress.meta import on_meta
from lrcompress.protocols import Spec
from lrcompress.registry import Registry

DENSE = "dense"
"""The format of a weight that is left as it is: an ordinary layer, with no entry in the manifest."""

RIGHT_FACTORS = ("A.weight", "pivot.weight")
"""What the layer of StoredLinear.right_factor is called in the formats that have one."""

SHARED_DICTIONARY = ("dictionary", "dictionary_scale")
"""What a dictionary that several weights share is called."""

FORMATS: Registry[type["StoredLinear"]] = Registry("format", "lrcompress.formats")


@dataclass(frozen=True)
class FactorPair:
    """Names of the parameters left and right of a weight that moves with left @ right, whatever it adds to that.

    With `pivoted` the product is of [I; left]: rows of `right` are rows of the weight too.
    """

    left: str
    right: str
    pivoted: bool = False


class StoredLinear(nn.Module, ABC):
    """A linear layer y = x Wᵀ + b whose weight is held in a stored format; its state dict is what is stored.

    The zero-size buffer `weight` carries the original parameter's name, so that a loader which does not know
    the format stops on the shape instead of filling a dense weight at random.
    """

    name: ClassVar[str]
    weight: Tensor

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not the next class's: LeafLinear has nn.Linear there
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        self.register_buffer("weight", torch.empty(0, dtype=dtype))

    @classmethod
    @abstractmethod
    def bytes(cls, spec: Spec, element_size: int) -> int:
        """Bytes that count for the weight: everything stored but a bias that the dense layer had too."""

    @classmethod
    def multiplies(cls, spec: Spec) -> int:
        """Multiply-adds per token: those of the dense weight, for formats that multiply by it."""
        return spec.shape[0] * spec.shape[1]

    @classmethod
    def numbers(cls, spec: Spec) -> int:
        """Count of stored numbers of the weight (indices and an added bias included)."""
        with on_meta():
            stored = cls(spec, torch.float32).state_dict()
        original_bias = spec.shape[0] if spec.bias and not spec.added_bias else 0
        return sum(t.numel() for t in stored.values()) - original_bias

    def multiply_adds(self, rows: int) -> int:
        """Multiply-adds for each of `rows` rows of the input, as they are multiplied here without gradients."""
        return self.multiplies(self.spec)

    @abstractmethod
    def touched_bytes(self, rows: int) -> int:
        """Least bytes of the weight, as held in memory, that multiplying `rows` rows without gradients moves.

        What every call decodes is read as it is stored, written decoded and read again. A bias is included.
        """

    def kernel(self, rows: int) -> str:
        """Name, for people, of what multiplies `rows` rows without gradients in the state that this layer is in."""
        return DENSE_PRODUCT

    def factor_names(self) -> list[str]:
        """Parameters that training moves: none that scales integer codes, which are all named so."""
        return [name for name, _ in self.named_parameters() if not name.endswith("scale")]

    def factor_pair(self) -> FactorPair | None:
        """The two factors of a low-rank part in full precision, None where there are none."""
        return None

    @classmethod
    @abstractmethod
    def check(cls, spec: Spec) -> None:
        """Raise InputError where the parameters cannot belong to this format."""

    def follow(self, owner: "StoredLinear") -> None:
        """Use what `owner`, the module that the spec names, stores for both."""
        raise InputError(f"format {self.name} shares nothing, the manifest says that it does")

    def right_factor(self) -> nn.Linear | None:
        """The layer of this one that multiplies by a right factor, which others may use too; None where it has none."""
        return None

    def whole_state(self) -> dict[str, Tensor]:
        """The state dict of the same weight with nothing shared."""
        return dict(self.state_dict())

    def check_indices(self) -> None:
        """Raise InputError where stored indices point where nothing is, as those of a damaged file may."""

    def lay_out(self) -> None:
        """Arrange the loaded tensors in memory as they multiply fastest; shapes and values stay."""

    def refuse_index(self, tensor: str, wanted: str) -> InputError:
        """The error of `check_indices`."""
        return InputError(
            f"format {self.name} of shape {self.spec.shape}: {tensor} is not {wanted}: the checkpoint is damaged, "
            "copy it again or compress again"
        )

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight (out, in) that this layer multiplies by, in the factors' dtype."""

    @abstractmethod
    def dense_bias(self) -> Tensor | None:
        """The bias (out,) of the equivalent dense layer."""

    def bias_tensors(self, bias: Tensor) -> dict[str, Tensor]:
        """How the bias (out,) of the equivalent dense layer is stored beside this weight."""
        return {"bias": bias}

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out)."""

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        shown = ", ".join(f"{k}={v}" for k, v in self.spec.parameters.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, {shown}"


def _empty_bias(layer: StoredLinear) -> Tensor | None:
    return layer.weight if layer.spec.bias else None


empty_bias = property(_empty_bias)
"""`bias` of formats that store theirs in a layer within; some architectures initialise it by its name when loading."""


class KernelLinear(nn.Linear):
    """A layer of numbers, a factor or what stayed dense, that our kernels multiply; see kernels/products.py: linear."""

    def kernel(self, rows: int) -> str:
        return way(NumberRows(self.weight), rows, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LeafLinear(StoredLinear, nn.Linear):
    """A stored format without layers of its own: an nn.Linear by name, so that PEFT puts adapters on it.

    None of nn.Linear's parameters is made. Formats that hold layers are no nn.Linear: PEFT adapts those layers, and its
    `all-linear` fails on a linear layer within another.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]


class RowsLinear(LeafLinear):
    """A format whose rows are decoded as they are multiplied: a decoded weight would cost the memory that was saved."""

    @abstractmethod
    def stored_rows(self) -> Rows:
        """What is stored, as the kernels read it."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x (..., in) Wᵀ, with gradients of x, and of parameters that are not in `by_torch`."""

    def by_torch(self) -> list[Tensor]:
        """Parameters of the weight whose gradients only torch's product with the whole weight has."""
        return [parameter for name, parameter in self.named_parameters() if name != "bias"]

    def dense(self) -> Tensor:
        weight = self.stored_rows()
        return weight.numbers(0, weight.rows)

    def kernel(self, rows: int) -> str:
        weight = self.stored_rows()
        return way(weight, rows, weight.dtype)

    def touched_bytes(self, rows: int) -> int:
        weight = self.stored_rows()
        return held(*self.state_dict().values()) + decoded_bytes(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        if trains(*self.by_torch()):
            return nn.functional.linear(x, self.dense(), self.bias)
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def trains(*tensors: Tensor | None) -> bool:
    """Whether gradients of one of the tensors are wanted: then the weight is decoded whole, by torch."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)


def decoded_bytes(weight: Rows, rows: int, *, transposed: bool = False) -> int:
    """Bytes that are written and read again while `rows` rows are multiplied without gradients."""
    if way(weight, rows, weight.dtype, transposed=transposed) in (COMPILED, GATHERED):
        return 0
    return 2 * weight.rows * weight.columns * weight.dtype.itemsize


def build(spec: Spec, dtype: torch.dtype) -> StoredLinear:
    """The module of `spec` with uninitialised tensors on the current default device."""
    cls = FORMATS.get(spec.format)
    cls.check(spec)
    return cls(spec, dtype)


def restored(
    spec: Spec, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | None = None
) -> StoredLinear:
    """The module of stored tensors, those that it shares among them, computing in `dtype`; nothing requires gradients.

    The empty `weight` may be missing from the tensors. InputError where their indices point nowhere.
    """
    with on_meta():
        module = build(spec.alone(), dtype)
    cast = {k: t.to(device, dtype if t.is_floating_point() else None) for k, t in tensors.items()}
    module.load_state_dict({"weight": torch.empty(0, dtype=dtype, device=device), **cast}, assign=True)
    module.check_indices()
    return module.requires_grad_(False)


def stored_tensors(spec: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name to meta tensor of everything that is stored for `spec`."""
    with on_meta():
        return dict(build(spec, dtype).state_dict())


def spec_bytes(spec: Spec, element_size: int) -> int:
    """Bytes that count for the weight in `spec`, a weight kept dense included; see StoredLinear.bytes."""
    if spec.format == DENSE:
        return spec.shape[0] * spec.shape[1] * element_size
    return FORMATS.get(spec.format).bytes(spec, element_size)


def spec_multiplies(spec: Spec) -> int:
    """Multiply-adds per token by the weight in `spec`; see StoredLinear.multiplies."""
    return spec.shape[0] * spec.shape[1] if spec.format == DENSE else FORMATS.get(spec.format).multiplies(spec)


def spec_numbers(spec: Spec) -> int:
    """Count of numbers that are stored for the weight in `spec`; see StoredLinear.numbers."""
    return spec.shape[0] * spec.shape[1] if spec.format == DENSE else FORMATS.get(spec.format).numbers(spec)


def held(*tensors: Tensor) -> int:
    """Bytes of the tensors."""
    return sum(t.numel() * t.itemsize for t in tensors)


def possible_places(key: str, own: str, owner: str) -> list[str]:
    """Names that tensor `key` of a weight may lie under: beginning with `own` or, where it is shared, with `owner`.

    The owner's format may differ, and call it otherwise.
    """
    lent = RIGHT_FACTORS if key in RIGHT_FACTORS else (key,) if key in SHARED_DICTIONARY else ()
    return [own + key, *(owner + name for name in lent)]


def added_bias_bytes(spec: Spec, element_size: int) -> int:
    """Bytes of a bias that the dense layer did not have."""
    return spec.shape[0] * element_size if spec.bias and spec.added_bias else 0


def index_dtype(largest: int) -> torch.dtype:
    """Smallest of int16 and int32 that holds 0..largest."""
    return torch.int16 if largest <= torch.iinfo(torch.int16).max else torch.int32


def check_rank(spec: Spec, *, largest: int | None = None) -> int:
    """The spec's rank; InputError unless it is a whole number from 1 to min(out, in)."""
    rank, limit = spec.parameters.get("rank"), largest or min(spec.shape)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit:
        raise InputError(f"format {spec.format} of shape {spec.shape} has rank {rank!r}: 1 to {limit} is possible")
    return rank
