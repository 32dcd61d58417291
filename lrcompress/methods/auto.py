"""auto: our best at equal bytes."""

from typing import ClassVar

import pydantic
from torch import Tensor

from lrcompress.methods.base import METHODS, Method, MethodOptions
from lrcompress.methods.cospadi import Cospadi, CospadiOptions
from lrcompress.methods.lord import Lord, LordOptions
from lrcompress.methods.spectral import Metric
from lrcompress.protocols import Curve, InputStatistics, Site, Spec


class AutoOptions(MethodOptions):
    """Options of auto."""

    metric: Metric = "two_sided"
    gradient_damping: float = pydantic.Field(0.1, ge=0.0)
    """Added to the output gradients' second moment, relative to its mean (metric=two_sided)."""


@METHODS.register
class Auto(Method):
    """Outputs weighed by the loss's gradients, one multiplier over all weights, the format that errs least.

    That is a sparse dictionary for every weight, as `cospadi` finds it: at equal bytes it errs less than low rank in
    every kind of weight that was measured (docs/quality.md). Formats low_rank and pivoted ask for those, in the full
    two-sided metric (KFAC-SVD; the Kronecker approximation of the curvature is that of arXiv 1503.05671).
    """

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "Auto"
    paper: ClassVar[str] = "https://arxiv.org/abs/1503.05671"
    summary: ClassVar[str] = "loss-aware sparse dictionaries or low rank, bytes where they lower the error most"
    Options: ClassVar[type[MethodOptions]] = AutoOptions
    formats: ClassVar[tuple[str, ...]] = ("auto", "low_rank", "pivoted")
    default_allocator: ClassVar[str] = "marginal_error"
    options: AutoOptions

    def __init__(self, options: MethodOptions, format: str | None = None, base: str | None = None) -> None:
        super().__init__(options, format, base)
        shared = self.options.model_dump()
        self._part: Method
        if self.format == "auto":
            self._part = Cospadi(CospadiOptions(**shared))
        else:
            self._part = Lord(LordOptions(**shared), self.format)
        self.errors_are_exact = self._part.errors_are_exact
        self.levels_are_ranks = self._part.levels_are_ranks

    @property
    def metric(self) -> str:
        return self.options.metric

    @property
    def needs_gradient_gram(self) -> bool:
        return self._part.needs_gradient_gram

    def curve(self, site: Site, element_size: int) -> Curve:
        return self._part.curve(site, element_size)

    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        return self._part.decompose(site, weight, statistics)

    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        return self._part.errors(artefact, curve)

    def total(self, artefact: dict[str, Tensor]) -> float:
        return self._part.total(artefact)

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        return self._part.spec(site, rank, element_size)

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        return self._part.encode(spec, artefact, bias)
