"""What a method answers; a new one is one file beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pydantic
from torch import Tensor

from lrcompress.bases import Existing
from lrcompress.errors import InputError, nearest
from lrcompress.protocols import Curve, InputStatistics, Site, Spec
from lrcompress.registry import Registry

METHODS: Registry[type["Method"]] = Registry("method", "lrcompress.methods")


class MethodOptions(pydantic.BaseModel):
    """The options of a method (`--set key=value`), declared once as typed fields."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    sink_share: float = pydantic.Field(0.125, ge=0.0, lt=1.0)
    """Share of a calibration block's weight that its first token gets (see collect.token_weights); 0 as published."""
    propagation: Literal["one_pass", "sequential"] = "one_pass"
    """Whose inputs a block's statistics are of: the dense model's, or what the compressed blocks before it give."""
    toward_dense: float = pydantic.Field(0.0, ge=0.0, le=1.0)
    """sequential: how far a weight aims at the dense model's output, rather than at its own on the compressed input."""
    labels: Literal["text", "sampled"] = "text"
    """Of the loss whose gradients a metric asks for: the text's next tokens, or tokens drawn from the model's own
    predictions, whose gradients' second moment is the curvature of the divergence from the dense model."""


class Method(ABC):
    """A named choice of metric, stored format, allocator and propagation, on plain tensors.

    The costly part, `decompose`, runs once per weight and returns tensors that wait in a scratch file;
    `encode` turns them into what is stored once the allocator has chosen a level.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]
    formats: ClassVar[tuple[str, ...]]
    """Values that --format may take; the first is the default."""
    default_allocator: ClassVar[str] = "uniform"
    freezes_dense: ClassVar[bool] = False
    """Weights that stay dense are marked frozen in the manifest (WeLore's N-LRC)."""
    default_base: ClassVar[str | None] = None
    """What the method corrects where no --base is given; None where it takes none."""
    takes_rank: ClassVar[bool] = False
    """Whether one rank for all weights (--rank) may be asked instead of a ratio."""

    retruncates: bool = False
    """Whether weights that are factorised already can be compressed further; see `decompose_product`."""

    levels_are_ranks: bool = False
    """A curve's levels are ranks of the weight itself, so that a ratio may count ranks."""

    cut: float = 0.5
    """Part of its dense bytes that a weight is cut to where sensitivities are measured: so little that it is felt."""

    sizes_are_estimates: bool = False
    """How many bytes a weight takes is known once it is encoded; a curve's are close (stages/lengths.py)."""

    rounds: bool = False
    """Weights are rounded with feedback, which takes Cholesky factors of both Grams and no eigenvectors."""

    takes_tokens: bool = False
    """Whether input embeddings may be targets, and no token is compared with another in an output head."""

    errors_are_exact: bool = True
    """`errors` are those of what is stored; False where they are estimates, good for comparing weights and levels."""

    def __init__(self, options: MethodOptions, format: str | None = None, base: str | None = None) -> None:
        self.options = options
        if base is not None and self.default_base is None:
            raise InputError(f"method {self.name} takes no --base ({base!r}): it is for methods that correct one, eora")
        self.base = base or self.default_base
        self.format = format or self.formats[0]
        if self.format not in self.formats:
            raise InputError(
                f"method {self.name} has no format {self.format!r}: {nearest(self.format, list(self.formats))}"
            )
        self._curves: dict[object, Curve] = {}

    @property
    def existing_base(self) -> Existing | None:
        """The checkpoint that the method corrects, to be opened before anything else is asked."""
        return None

    @property
    @abstractmethod
    def metric(self) -> str:
        """What must be preserved: plain, input, centred, trace or two_sided."""

    def search_work(self, site: Site) -> float:
        """Multiply-adds whose time the search for a weight's codes takes, of each level, in decomposing it; 0: none."""
        return 0.0

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration text is read at all."""
        return self.metric != "plain"

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass over the calibration text is made."""
        return self.metric in ("trace", "two_sided")

    @property
    def needs_gradient_gram(self) -> bool:
        """Whether the gradients of different outputs are compared; otherwise their squares are enough."""
        return False

    @property
    def keeps_gram(self) -> bool:
        """Whether an artefact holds the inputs' Gram (in, in) beside what is made of the weight."""
        return False

    def outputs_suffice(self, site: Site) -> bool:
        """Whether the second moment of a weight's outputs says all that `decompose` needs to know of its inputs."""
        return False

    @property
    def group(self) -> int:
        """How many neighbouring blocks' weights of one kind share a part of what is stored, and have one level."""
        return 1

    @property
    def levels_by_name(self) -> bool:
        """Whether weights of one shape may have other levels, as where each is corrected from what is there already."""
        return self.existing_base is not None

    @abstractmethod
    def curve(self, site: Site, element_size: int) -> Curve:
        """The levels of a site and their bytes, known before any decomposition."""

    def curve_of(self, site: Site, element_size: int) -> Curve:
        """`curve`; weights with the same levels share its tensors, for there may be tens of thousands of experts."""
        if self.levels_by_name or site.stored is not None:
            return self.curve(site, element_size)
        key = (site.shape, site.bias, site.conv1d, site.itemsize, site.lookup, site.head is None, element_size)
        known = self._curves.get(key)
        if known is None:
            known = self._curves[key] = self.curve(site, element_size)
        return Curve(site.name, known.ranks, known.bytes, known.dense_bytes)

    @abstractmethod
    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        """Everything that `errors` and `encode` need, from weight (out, in); the input is not changed."""

    def decompose_product(
        self, site: Site, left: Tensor, right: Tensor, statistics: InputStatistics | None
    ) -> dict[str, Tensor]:
        """`decompose` of the weight left (out, r) @ right (r, in)."""
        return self.decompose(site, left @ right, statistics)

    @abstractmethod
    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        """(levels,) float64 squared error in the metric per level of `curve`, ending in 0 for dense."""

    @abstractmethod
    def total(self, artefact: dict[str, Tensor]) -> float:
        """Squared size of the weight in the metric: what errors are relative to."""

    @abstractmethod
    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        """How the site is stored at a rank of its curve (the last one: dense)."""

    @abstractmethod
    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        """The stored tensors of `spec`, float32 or integer; bias is that of the dense layer."""

    def joins(self, site: Site) -> bool:
        """Whether the weight may share its right factor with others, where numbers speak for it (stages/join.py)."""
        return False

    def joint_spec(self, site: Site, rank: int, element_size: int) -> Spec:
        """`spec` of a weight that shares with others; the owner of what is shared is not named yet."""
        return self.spec(site, rank, element_size)

    def owner_spec(self, site: Site, rank: int, element_size: int) -> Spec:
        """`joint_spec` of the weight that stores what is shared."""
        return self.joint_spec(site, rank, element_size)

    def encode_together(
        self, specs: Sequence[Spec], artefacts: Sequence[dict[str, Tensor]], biases: Sequence[Tensor | None]
    ) -> list[dict[str, Tensor]]:
        """The stored tensors of weights that share something, its owner first."""
        return [self.encode(*weight) for weight in zip(specs, artefacts, biases, strict=True)]


def make_method(name: str, options: dict[str, Any], format: str | None = None, base: str | None = None) -> Method:
    """The registered method with validated options; an unknown option is an InputError that names the nearest."""
    cls = METHODS.get(name)
    known = list(cls.Options.model_fields)
    for key in options:
        if key not in known:
            raise InputError(f"method {name} has no option {key!r}: {nearest(key, known)}")
    try:
        return cls(cls.Options(**options), format, base)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"option {where} of method {name}: {first['msg']} (got {first['input']!r})") from error
