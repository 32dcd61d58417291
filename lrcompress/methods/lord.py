"""LoRD: low-rank decomposition by the output covariance (arXiv 2309.14021), centred as in AFM."""

from typing import ClassVar

from lrcompress.methods.base import METHODS, MethodOptions
from lrcompress.methods.spectral import JoiningOptions, Metric, SpectralMethod


class LordOptions(JoiningOptions):
    """Options of lord."""

    metric: Metric = "centred"


@METHODS.register
class Lord(SpectralMethod):
    """W ≈ U Uᵀ W with U the leading eigenvectors of the centred output covariance, the mean folded into a bias."""

    name: ClassVar[str] = "lord"
    title: ClassVar[str] = "LoRD"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.14021"
    summary: ClassVar[str] = "output-covariance low rank, mean folded into a bias"
    Options: ClassVar[type[MethodOptions]] = LordOptions
