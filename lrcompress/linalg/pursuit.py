"""Hard thresholding pursuit of the codes of a dictionary, and how long both take turns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.linalg.dictionary import SparseCode, largest, refit
from lrcompress.precision import exact, squares

REFIT_STEPS = 2
"""Conjugate gradient steps per round: a third makes no difference, with one alone the error is some per cent higher."""

STEP_GROWTH, STEP_LIMIT = 1.2, 2.0
"""A row whose new support was better takes longer gradient steps, one that refused it halves its step."""


class Pursuit:
    """Hard thresholding pursuit, a step at a time, on the rows of a target (..., n, p), each with its own length."""

    error: Tensor
    """(...) squared error after the last step, float64."""

    def __init__(
        self, target: Tensor, nonzeros: int, refit_steps: int = REFIT_STEPS, energy: Tensor | None = None
    ) -> None:
        self.nonzeros, self.refit_steps = nonzeros, refit_steps
        self.length = target.new_ones(*target.shape[:-1], 1)
        self._target, self._narrower = target, False
        self._energy = squares(target) if energy is None else energy

    def narrow(self, nonzeros: int) -> None:
        """Let the next step leave every row so many coefficients; where these are fewer, it may get worse."""
        self._narrower, self.nonzeros = nonzeros < self.nonzeros, nonzeros

    def step(self, dictionary: Tensor, codes: Tensor, support: Tensor) -> SparseCode:
        """Supports and codes (..., n, k) for a dictionary (..., k, p) of atoms of norm 1; no row gets worse."""
        gram, products = dictionary @ dictionary.mT, self._target @ dictionary.mT
        return SparseCode(dictionary, *self.advance(gram, products, codes, support))

    def advance(self, gram: Tensor, products: Tensor, codes: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """As `step`, from D Dᵀ (..., k, k) and Y Dᵀ (..., n, k) in any metric, whose energy of Y was given."""
        before, proposed, refitted, after = self.tried(gram, products, codes)
        better = after > before
        if self._narrower:
            better, self._narrower = torch.ones_like(better), False
        else:
            self.length = torch.where(better, (self.length * STEP_GROWTH).clamp_max(STEP_LIMIT), self.length / 2)
        explained = exact(torch.where(better, after, before)).sum((-2, -1))
        self.error = (self._energy - explained).clamp_min(0)
        return torch.where(better, refitted, codes), torch.where(better, proposed, support)

    def tried(self, gram: Tensor, products: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every row explains of its energy, (..., n, 1); supports after a gradient step; codes refitted on them
        from those codes; and what these explain."""
        gradient = products - codes @ gram
        before = (codes * (products + gradient)).sum(-1, keepdim=True)
        proposed = largest(codes.addcmul(gradient, self.length), self.nonzeros)
        refitted, after = refit(gram, products, proposed, codes, self.refit_steps)
        return before, proposed, refitted, after


def in_torch(target: Tensor) -> type[Pursuit]:
    """The pursuit of any target."""
    return Pursuit


@dataclass(frozen=True)
class Alternation:
    """How a dictionary and its codes take turns: at most so many rounds, ended by one that lowers the error by less
    than the share `tolerance` of it; `pursuit` says what pursues the codes of a target."""

    rounds: int
    tolerance: float = 0.0
    pursuit: Callable[[Tensor], type[Pursuit]] = in_torch
