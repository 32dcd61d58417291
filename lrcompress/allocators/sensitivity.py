"""Sensitivity: marginal error with every weight's errors in units of the loss that one measured cut of it costs."""

from typing import ClassVar

from lrcompress.allocators.base import ALLOCATORS
from lrcompress.allocators.marginal_error import MarginalError


@ALLOCATORS.register
class Sensitivity(MarginalError):
    """LEMS's surrogate (openreview IjIgNPFuCt): e(level) = KL(cut) error(level) / error(cut), its sum at least.

    The Kullback-Leibler divergences from the dense model, one cut weight at a time, are measured in
    stages/sensitivity.py, which scales the errors before they come here.
    """

    name: ClassVar[str] = "sensitivity"
    needs_sensitivity: ClassVar[bool] = True
