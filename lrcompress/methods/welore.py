"""WeLore: non-uniform rank from one global threshold (arXiv 2407.11239)."""

from typing import ClassVar

import pydantic

from lrcompress.methods.base import METHODS, MethodOptions
from lrcompress.methods.spectral import JoiningOptions, Metric, SpectralMethod


class WeloreOptions(JoiningOptions):
    """Options of welore."""

    metric: Metric = "input"
    min_rank_reduction: float = pydantic.Field(0.0, ge=0.0, lt=1.0)
    """Least fraction of the rank that must go for a weight to be factorised; the paper's rule is 0.5."""


@METHODS.register
class Welore(SpectralMethod):
    """Low-rank components are factorised, the others stay dense and frozen.

    `metric=plain` is the data-free method as published; it destroys small models.
    """

    name: ClassVar[str] = "welore"
    title: ClassVar[str] = "WeLore"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.11239"
    summary: ClassVar[str] = "one global threshold on normalised singular values, N-LRC weights dense and frozen"
    Options: ClassVar[type[MethodOptions]] = WeloreOptions
    default_allocator: ClassVar[str] = "welore"
    freezes_dense: ClassVar[bool] = True

    def largest_rank(self, shape: tuple[int, int]) -> int:
        reduction = self.options.min_rank_reduction  # type: ignore[attr-defined]
        return int((1.0 - reduction) * min(shape))
