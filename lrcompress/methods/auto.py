"""auto: our best at equal bytes."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.formats.coded import Coded
from lrcompress.formats.sparse_dictionary import SparseDictionary
from lrcompress.formats.table import Table
from lrcompress.formats.transposed_dictionary import TransposedDictionary
from lrcompress.methods.base import METHODS, Method, MethodOptions
from lrcompress.methods.cospadi import Cospadi
from lrcompress.methods.dictionary_options import CospadiOptions
from lrcompress.methods.ecsq import Ecsq, EcsqOptions
from lrcompress.methods.lord import Lord, LordOptions
from lrcompress.methods.spectral import Metric
from lrcompress.protocols import Curve, InputStatistics, Site, Spec

UNEQUAL = 1.5
"""From this ratio of the sides on a dictionary errs less than low rank at the same bytes; measured on sides of ratio 1,
2.7 and 3 (docs/quality.md)."""


class AutoOptions(MethodOptions):
    """Options of auto."""

    metric: Metric = "two_sided"
    damping: float = pydantic.Field(0.01, ge=0.0)
    """coded: added to the inputs' second moment, relative to its mean."""
    gradient_damping: float = pydantic.Field(0.1, ge=0.0)
    """Added to the output gradients' second moment, relative to its mean (metric=two_sided)."""
    join: Literal["none", "auto"] = "none"
    """auto: of the low-rank weights, those of one input and equal ones of neighbouring blocks share their right factor
    where they then err less at no more bytes."""


@METHODS.register
class Auto(Method):
    """Errors weighed as the loss feels them (KFAC), one multiplier over all weights.

    Format `coded` is method ecsq: at equal bytes nothing in 16 bits comes near it (docs/quality.md). Format `auto` is
    the best of 16-bit numbers: a weight that is longer than wide is a sparse dictionary with the codes along its longer
    side, as atoms are cheap there; one that is about square is of low rank, pivoted. low_rank and pivoted ask for
    these everywhere. The Kronecker approximation of the curvature is that of arXiv 1503.05671.
    """

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "Auto"
    paper: ClassVar[str] = "https://arxiv.org/abs/1503.05671"
    summary: ClassVar[str] = "loss-aware entropy-coded integers; --format auto: low rank and dictionaries in 16 bits"
    Options: ClassVar[type[MethodOptions]] = AutoOptions
    formats: ClassVar[tuple[str, ...]] = ("coded", "auto", "low_rank", "pivoted")
    default_allocator: ClassVar[str] = "marginal_error"
    options: AutoOptions

    def __init__(self, options: MethodOptions, format: str | None = None, base: str | None = None) -> None:
        super().__init__(options, format, base)
        codes = self.format == Coded.name
        if codes and self.options.join != "none":
            raise InputError(
                f"join={self.options.join} is of low-rank weights, which --format coded has none of: "
                "add --format auto, low_rank or pivoted"
            )
        shared = self.options.model_dump(exclude={"join", "damping"})
        self._coded = Ecsq(EcsqOptions(**shared, damping=self.options.damping))
        self._low_rank = Lord(LordOptions(**shared, join=self.options.join), "auto" if codes else self.format)
        self._by_output = Cospadi(CospadiOptions(**shared))
        self._by_input = Cospadi(CospadiOptions(**shared, side="input"))
        if codes:
            self.sizes_are_estimates, self.cut = self._coded.sizes_are_estimates, self._coded.cut
            self.rounds = self._coded.rounds
            self.takes_tokens = self._coded.takes_tokens
        self.errors_are_exact = self.levels_are_ranks = self.retruncates = self.format in ("low_rank", "pivoted")

    @property
    def metric(self) -> str:
        return self.options.metric

    @property
    def needs_gradient_gram(self) -> bool:
        return self._low_rank.needs_gradient_gram

    @property
    def keeps_gram(self) -> bool:
        return self._low_rank.keeps_gram

    def joins(self, site: Site) -> bool:
        return self._part(site) is self._low_rank and self._low_rank.joins(site)

    def joint_spec(self, site: Site, rank: int, element_size: int) -> Spec:
        return self._low_rank.joint_spec(site, rank, element_size)

    def owner_spec(self, site: Site, rank: int, element_size: int) -> Spec:
        return self._low_rank.owner_spec(site, rank, element_size)

    def encode_together(
        self, specs: Sequence[Spec], artefacts: Sequence[dict[str, Tensor]], biases: Sequence[Tensor | None]
    ) -> list[dict[str, Tensor]]:
        return self._low_rank.encode_together(specs, artefacts, biases)

    def _part(self, site: Site) -> Method:
        if self.format == Coded.name:
            return self._coded
        if self.format != "auto" or max(site.shape) < UNEQUAL * min(site.shape):
            return self._low_rank
        return self._by_output if site.shape[0] > site.shape[1] else self._by_input

    def curve(self, site: Site, element_size: int) -> Curve:
        return self._part(site).curve(site, element_size)

    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        return self._part(site).decompose(site, weight, statistics)

    def decompose_product(
        self, site: Site, left: Tensor, right: Tensor, statistics: InputStatistics | None
    ) -> dict[str, Tensor]:
        return self._part(site).decompose_product(site, left, right, statistics)

    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        return self._maker(artefact).errors(artefact, curve)

    def total(self, artefact: dict[str, Tensor]) -> float:
        return self._maker(artefact).total(artefact)

    def _maker(self, artefact: dict[str, Tensor]) -> Method:
        """The part that made an artefact, but for the side of a dictionary."""
        if self.format == Coded.name:
            return self._coded
        return self._by_output if "roots" in artefact else self._low_rank

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        return self._part(site).spec(site, rank, element_size)

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        parts: dict[str, Method] = {
            Coded.name: self._coded,
            Table.name: self._coded,
            SparseDictionary.name: self._by_output,
            TransposedDictionary.name: self._by_input,
        }
        return parts.get(spec.format, self._low_rank).encode(spec, artefact, bias)
