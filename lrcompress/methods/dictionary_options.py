"""Options of sparse dictionaries."""

from typing import Literal

import pydantic

from lrcompress.methods.base import MethodOptions
from lrcompress.methods.spectral import Metric

Bits = Literal[8, 16]

ROUNDS_ALONE, ROUNDS = 15, 24
"""Of htp with a dictionary of its own, and of what has no momentum: equally near."""


FULL_GRAM_ROUNDS = 3
"""Nine tenths of what twelve gain."""


class CospadiOptions(MethodOptions):
    """Options of cospadi."""

    metric: Metric = "input"
    solver: Literal["htp", "procrustes", "ksvd"] = "htp"
    """htp: free dictionary, supports refined, coefficients by least squares; procrustes: COMPOT; ksvd: the paper."""
    k_over_s: float = pydantic.Field(2.5, ge=1.0, le=16.0)
    """Atoms of the dictionary per coefficient of an output."""
    rounds: int | None = pydantic.Field(None, ge=0)
    """At most so many alternations of dictionary and codes: 15, or 24 for a shared dictionary and the other solvers
    (procrustes is published with 20, ksvd with 60)."""
    tolerance: float = pydantic.Field(0.004, ge=0.0)
    """Alternations end where one lowers the squared error by less than this share of it; 0 runs them all."""
    coefficient_bits: Bits = 16
    dictionary_bits: Bits = 16
    group: int = pydantic.Field(1, ge=1)
    """Neighbouring blocks whose weights of one kind share a dictionary, each in a metric of its own (GeoPair)."""
    gradient_damping: float = pydantic.Field(0.1, ge=0.0)
    """Added to the outputs' squared gradients, relative to their mean (metric=two_sided)."""
    side: Literal["output", "input"] = "output"
    """Who chooses its atoms: every output, as published, or every input (W is then Dᵀ Sᵀ, good for wide weights)."""
    coupled_rounds: int | None = pydantic.Field(None, ge=0)
    """Rounds in a full Gram after those in its diagonal: of the output gradients (metric=two_sided), or with side=input
    of the inputs. 3 where such a Gram is there; shared dictionaries and those of 8 bits know its diagonal only."""

    @property
    def limits(self) -> tuple[int, float]:
        """Alternations of dictionary and codes at most, and the tolerance."""
        known = ROUNDS_ALONE if self.group == 1 and self.solver == "htp" else ROUNDS
        return known if self.rounds is None else self.rounds, self.tolerance

    @property
    def by_input(self) -> bool:
        """Whether Wᵀ is coded."""
        return self.side == "input"

    @property
    def keeps_gram(self) -> bool:
        """A rounded or a shared dictionary is no combination of the weight's rows, so it needs the Gram itself."""
        return self.dictionary_bits == 8 or self.group > 1

    @property
    def full_gram_rounds(self) -> int:
        """Rounds in the full Gram of the rows that are coded."""
        if self.coupled_rounds is None:
            apart = self.group == 1 and not self.keeps_gram and self.coefficient_bits == 16
            return FULL_GRAM_ROUNDS if self.by_input or (self.metric == "two_sided" and apart) else 0
        return self.coupled_rounds
