"""auto: our best at equal bytes."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic
from torch import Tensor

from lrcompress.formats.sparse_dictionary import SparseDictionary
from lrcompress.formats.transposed_dictionary import TransposedDictionary
from lrcompress.methods.base import METHODS, Method, MethodOptions
from lrcompress.methods.cospadi import Cospadi, CospadiOptions
from lrcompress.methods.lord import Lord, LordOptions
from lrcompress.methods.spectral import Metric
from lrcompress.protocols import Curve, InputStatistics, Site, Spec

UNEQUAL = 1.5
"""From this ratio of the sides on a dictionary errs less than low rank at the same bytes; measured on sides of ratio 1,
2.7 and 3 (docs/quality.md)."""


class AutoOptions(MethodOptions):
    """Options of auto."""

    metric: Metric = "two_sided"
    gradient_damping: float = pydantic.Field(0.1, ge=0.0)
    """Added to the output gradients' second moment, relative to its mean (metric=two_sided)."""
    join: Literal["none", "auto"] = "none"
    """auto: of the low-rank weights, those of one input and equal ones of neighbouring blocks share their right factor
    where they then err less at no more bytes."""


@METHODS.register
class Auto(Method):
    """Errors weighed as the loss feels them (KFAC), one multiplier over all weights, per weight the better format.

    A weight that is longer than wide is a sparse dictionary with the codes along its longer side, as atoms are cheap
    there; one that is about square is of low rank, pivoted. Formats low_rank and pivoted ask for these everywhere.
    The Kronecker approximation of the curvature is that of arXiv 1503.05671.
    """

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "Auto"
    paper: ClassVar[str] = "https://arxiv.org/abs/1503.05671"
    summary: ClassVar[str] = "loss-aware low rank and sparse dictionaries, bytes where they lower the error most"
    Options: ClassVar[type[MethodOptions]] = AutoOptions
    formats: ClassVar[tuple[str, ...]] = ("auto", "low_rank", "pivoted")
    default_allocator: ClassVar[str] = "marginal_error"
    options: AutoOptions

    def __init__(self, options: MethodOptions, format: str | None = None, base: str | None = None) -> None:
        super().__init__(options, format, base)
        shared = self.options.model_dump(exclude={"join"})
        self._low_rank = Lord(LordOptions(**shared, join=self.options.join), self.format)
        self._by_output = Cospadi(CospadiOptions(**shared))
        self._by_input = Cospadi(CospadiOptions(**shared, side="input"))
        self.errors_are_exact = self.levels_are_ranks = self.retruncates = self.format != "auto"

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
        part = self._by_output if "roots" in artefact else self._low_rank
        return part.errors(artefact, curve)

    def total(self, artefact: dict[str, Tensor]) -> float:
        return float(artefact["energies"].sum())

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        return self._part(site).spec(site, rank, element_size)

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        parts = {SparseDictionary.name: self._by_output, TransposedDictionary.name: self._by_input}
        return parts.get(spec.format, self._low_rank).encode(spec, artefact, bias)
