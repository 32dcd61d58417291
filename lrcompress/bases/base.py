"""What a base offers, and how its SPEC is read; a new one is one file beside this one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.formats import restored
from lrcompress.formats.semi_sparse import PATTERN, SemiSparse
from lrcompress.linalg.packing import UNITS
from lrcompress.linalg.whitening import check_gram
from lrcompress.precision import wide, widened
from lrcompress.protocols import Spec
from lrcompress.registry import Registry

BASES: Registry[type["ComputedBase"]] = Registry("base", "lrcompress.bases")


@dataclass(frozen=True)
class BaseOptions:
    """act_order: columns of large inputs first (gptq); clip_search: the best of several ranges per group."""

    act_order: bool = False
    clip_search: bool = False


@dataclass(frozen=True)
class Compressed:
    """A weight in a base's format: spec, stored tensors, and what they multiply by, (out, in) wide."""

    spec: Spec
    tensors: dict[str, Tensor]
    dense: Tensor


class Base(ABC):
    """What a weight (out, in) is stored as before it is corrected; `site` is the name of its module."""

    needs_gram: ClassVar[bool]
    takes: ClassVar[tuple[str, ...]] = ()
    """The fields of BaseOptions that mean something here."""

    def __init__(self, options: BaseOptions) -> None:
        self.options = options

    @property
    @abstractmethod
    def text(self) -> str:
        """The SPEC, as --base takes it."""

    @abstractmethod
    def spec(self, shape: tuple[int, int], site: str = "") -> Spec:
        """How a weight of this shape is stored, dense where it cannot be; only an existing one may have a bias."""

    @abstractmethod
    def compress(self, weight: Tensor, gram: Tensor | None, site: str = "") -> Compressed:
        """Spec, tensors and dense reconstruction; the inputs are not changed, non-finite ones an ArithmeticError."""


class ComputedBase(Base):
    """A weight (out, in) and perhaps the Gram (in, in) of its inputs to the tensors of a stored format."""

    name: ClassVar[str]
    example: ClassVar[str]
    paper: ClassVar[str]

    def __init__(self, arguments: list[str], options: BaseOptions) -> None:
        super().__init__(options)
        self.arguments = arguments

    @property
    def text(self) -> str:
        return ":".join([self.name, *self.arguments])

    @abstractmethod
    def encode(self, weight: Tensor, gram: Tensor | None) -> dict[str, Tensor]:
        """The stored tensors of weight (out, in) wide, finite; gram (in, in) wide where needs_gram."""

    def compress(self, weight: Tensor, gram: Tensor | None, site: str = "") -> Compressed:
        weight = widened(weight)
        if not all_finite(weight):
            raise ArithmeticError("the weight has non-finite entries")
        if gram is not None:
            gram = widened(gram)
            check_gram(gram, "the inputs")
        elif self.needs_gram:
            raise ValueError(f"base {self.text} needs the Gram of the inputs")
        spec = self.spec((weight.shape[0], weight.shape[1]))
        tensors = self.encode(weight, gram)
        return Compressed(spec, tensors, dense_of(spec, tensors))


class GridBase(ComputedBase):
    """NAME:BITS:GROUP, stored as `quantized`."""

    takes: ClassVar[tuple[str, ...]] = ("clip_search",)

    def __init__(self, arguments: list[str], options: BaseOptions) -> None:
        super().__init__(arguments, options)
        try:
            self.bits, self.group = map(int, arguments)
        except ValueError as error:
            raise self._malformed() from error
        if self.bits not in UNITS or self.group < 1:
            raise self._malformed()

    def _malformed(self) -> InputError:
        return InputError(
            f"base {self.text!r} is not understood: write {self.name}:BITS:GROUP with {', '.join(map(str, UNITS))} "
            f"bits and inputs per group, such as {self.example}"
        )

    def spec(self, shape: tuple[int, int], site: str = "") -> Spec:
        return Spec("quantized", shape, parameters={"bits": self.bits, "group": self.group})


class SparseBase(ComputedBase):
    """NAME:2:4, stored as `semi_sparse`."""

    def __init__(self, arguments: list[str], options: BaseOptions) -> None:
        super().__init__(arguments, options)
        if ":".join(arguments) != PATTERN:
            raise InputError(f"base {self.text!r} is not understood: {self.name}:{PATTERN} is possible")

    def spec(self, shape: tuple[int, int], site: str = "") -> Spec:
        return Spec("semi_sparse", shape, parameters={"pattern": PATTERN})

    def encode(self, weight: Tensor, gram: Tensor | None) -> dict[str, Tensor]:
        return SemiSparse.encode(*self.prune(weight, gram), bias=None)

    @abstractmethod
    def prune(self, weight: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight (out, in), perhaps updated, and the mask (out, in) of what is kept: two in every four columns."""


def dense_of(spec: Spec, tensors: dict[str, Tensor]) -> Tensor:
    """What the stored tensors multiply by, (out, in) wide."""
    return restored(spec, tensors, wide(next(iter(tensors.values())).device)).dense()
