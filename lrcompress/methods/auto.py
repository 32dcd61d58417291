"""auto: our best at equal bytes."""

from typing import ClassVar

from lrcompress.methods.base import METHODS, MethodOptions
from lrcompress.methods.spectral import Metric, SpectralMethod, SpectralOptions


class AutoOptions(SpectralOptions):
    """Options of auto."""

    metric: Metric = "two_sided"


@METHODS.register
class Auto(SpectralMethod):
    """Two-sided metric (KFAC-SVD), one multiplier over all weights, the smallest stored format for each.

    The Kronecker approximation of the loss's curvature is that of KFAC (arXiv 1503.05671); the allocation goes by
    discarded energy per stored byte.
    """

    name: ClassVar[str] = "auto"
    title: ClassVar[str] = "Auto"
    paper: ClassVar[str] = "https://arxiv.org/abs/1503.05671"
    summary: ClassVar[str] = "loss-aware low rank, bytes where they lower the error most"
    Options: ClassVar[type[MethodOptions]] = AutoOptions
    default_allocator: ClassVar[str] = "marginal_error"
