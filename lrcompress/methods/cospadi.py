"""CoSpaDi: sparse dictionaries learnt on whitened weights (arXiv 2509.22075), with the solvers of later work."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.formats import spec_bytes
from lrcompress.formats.sparse_dictionary import SparseDictionary
from lrcompress.formats.transposed_dictionary import TransposedDictionary
from lrcompress.linalg.truncation import decompose, tail_energies
from lrcompress.linalg.whitening import damped
from lrcompress.methods.base import METHODS, Method, MethodOptions
from lrcompress.methods.dictionary_encoding import encoded, encoded_together
from lrcompress.methods.dictionary_options import CospadiOptions
from lrcompress.precision import wide, widened
from lrcompress.protocols import Curve, InputStatistics, Site, Spec

SPARSITY_COST = 0.07
"""Share of the ranks between s and k that a sparse code loses against rank k, per k / s - 1 and per out / in, that at
most 2: on the demo and synthetic weights, at k / s = 2.5, 0.13 where out / in is 2.7, 0.08 at 1 and 0.02 at 0.4."""

INPUT_DAMPING = 1e-3
"""Of the inputs' Gram where it weighs the rows of Wᵀ, relative to its mean eigenvalue."""

LEAST_WEIGHT = 1e-6
"""Outputs whose squared gradient is below this share of the mean count as much as that."""


@METHODS.register
class Cospadi(Method):
    """W ≈ S D with s coefficients per output, the error measured on the calibration inputs.

    Metrics are those of the low-rank methods. In `two_sided` the Gram of the gradients ties the rows of S together,
    which only the last `coupled_rounds` take into account; before them every output is weighed by its own squared
    gradient.
    The levels of a weight are numbers of coefficients s. Errors are not known before the solver has run, so they
    are estimated: see `errors`.
    """

    name: ClassVar[str] = "cospadi"
    title: ClassVar[str] = "CoSpaDi"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.22075"
    summary: ClassVar[str] = "sparse dictionary: a few atoms of its own choice for every output"
    Options: ClassVar[type[MethodOptions]] = CospadiOptions
    formats: ClassVar[tuple[str, ...]] = (SparseDictionary.name,)
    errors_are_exact: bool = False

    options: CospadiOptions

    def __init__(self, options: MethodOptions, format: str | None = None, base: str | None = None) -> None:
        super().__init__(options, format, base)
        self._levels: dict[tuple[tuple[int, int], bool, int], list[tuple[int, int]]] = {}
        if self.group > 1 and self.options.solver != "htp":
            raise InputError(f"group={self.group} needs solver=htp, solver {self.options.solver} takes one weight only")
        if self.options.coupled_rounds and self.metric != "two_sided" and not self.options.by_input:
            raise InputError(f"coupled_rounds need the gradients' Gram, metric {self.metric} has none: use two_sided")
        if self.options.full_gram_rounds and (self.group > 1 or self.keeps_gram or self.options.coefficient_bits == 8):
            raise InputError("side=input and coupled_rounds are for 16 bits and a dictionary that nobody shares")

    @property
    def metric(self) -> str:
        return self.options.metric

    @property
    def group(self) -> int:
        return self.options.group

    @property
    def needs_gradient_gram(self) -> bool:
        return self.metric == "two_sided" and (self.options.by_input or self.options.full_gram_rounds > 0)

    def curve(self, site: Site, element_size: int) -> Curve:
        """With a shared dictionary, a weight's part of a whole group's bytes."""
        key = (site.shape, site.bias, element_size)
        if key not in self._levels:
            self._levels[key] = self._costs(site, element_size)
        levels, dense = self._levels[key], site.shape[0] * site.shape[1] * element_size
        ranks, costs = [rank for rank, _ in levels], [cost for _, cost in levels]
        return Curve(site.name, torch.tensor([*ranks, min(site.shape)]), torch.tensor([*costs, dense]), dense)

    def _costs(self, site: Site, element_size: int) -> list[tuple[int, int]]:
        """(coefficients, bytes) of the levels below dense."""
        found = []
        for nonzeros in range(1, min(site.shape)):
            spec = self.spec(site, nonzeros, element_size)
            shared = (self.group - 1) * spec_bytes(spec.following(site.name), element_size)
            cost = -(-(spec_bytes(spec, element_size) + shared) // self.group)
            if cost >= site.shape[0] * site.shape[1] * element_size:
                break
            found.append((nonzeros, cost))
        return found

    def _atoms(self, shape: tuple[int, int], nonzeros: int) -> int:
        """Size of the dictionary of `shape` (rows that are coded, length of an atom) for a number of coefficients.

        An orthonormal one has at most the smaller of both.
        """
        limit = min(shape) if self.options.solver == "procrustes" else shape[0]
        return min(round(self.options.k_over_s * nonzeros), limit)

    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        """With R W G^½ = P Σ Qᵀ only P and Σ matter to the solver: the rows of P Σ are those of R W G^½, rotated.

        R, diagonal, weighs the outputs where the metric has gradients.
        """
        gram = None
        if statistics is not None and self.metric != "plain":
            gram = statistics.gram(centred=self.metric == "centred")
        if self.options.by_input:
            return self._decompose_by_input(widened(weight), gram, statistics)
        roots = self._output_roots(weight, statistics)
        spectrum = decompose(widened(weight) * roots[:, None], gram)
        artefact = {"weight": weight.float(), "left": spectrum.left.float(), "energies": spectrum.energies}
        artefact["roots"] = roots
        outputs = self._output_gram(statistics)
        if outputs is not None:
            artefact["rows"], artefact["diagonal"] = outputs.float(), spectrum.energies
            artefact["energies"] = decompose(weight, gram, outputs).energies
        if gram is not None and self.keeps_gram:
            artefact["gram"] = gram.float()
        if self.metric == "centred" and statistics is not None:
            artefact["mean"] = statistics.mean()
        return artefact

    def _decompose_by_input(
        self, weight: Tensor, gram: Tensor | None, statistics: InputStatistics | None
    ) -> dict[str, Tensor]:
        """As `decompose`, for Wᵀ: the Gram of the inputs weighs its rows, that of the gradients its columns."""
        outputs = self._output_gram(statistics)
        scale = 1.0
        if self.metric == "trace" and statistics is not None:
            scale = float(statistics.gradient_squares().mean())
        rows = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        if gram is not None and bool((gram.diagonal() > 0).any()):
            rows = damped(gram, INPUT_DAMPING)
        roots = rows.diagonal().sqrt()
        spectrum = decompose(weight.T * roots[:, None], outputs)
        artefact = {"weight": weight.T.float(), "left": spectrum.left.float(), "diagonal": spectrum.energies}
        artefact |= {"roots": roots, "rows": rows.float()}
        artefact["energies"] = scale * decompose(weight, gram, outputs).energies
        if self.metric == "centred" and statistics is not None:
            artefact["mean"] = statistics.mean()
        return artefact

    def _output_gram(self, statistics: InputStatistics | None) -> Tensor | None:
        """(out, out) wide: the damped Gram of the gradients; None where it is not asked for, or zero."""
        if not self.needs_gradient_gram or statistics is None or not bool((statistics.gradient_squares() > 0).any()):
            return None
        assert statistics.gradients is not None
        return damped(statistics.gradients, self.options.gradient_damping)

    @property
    def keeps_gram(self) -> bool:
        return self.options.keeps_gram

    def _output_roots(self, weight: Tensor, statistics: InputStatistics | None) -> Tensor:
        """(out,) wide: the diagonal of R, all ones where the metric has no gradients, or these are zero."""
        ones = torch.ones(len(weight), dtype=wide(weight.device), device=weight.device)
        if not self.needs_gradients or statistics is None:
            return ones
        squares = widened(statistics.gradient_squares())
        mean = squares.mean()
        if not bool(torch.isfinite(mean)):
            raise ArithmeticError("the gradients have non-finite entries")
        if mean <= 0:
            return ones
        if self.metric == "trace":
            return ones * mean.sqrt()
        return (squares + self.options.gradient_damping * mean).clamp_min(LEAST_WEIGHT * mean).sqrt()

    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        """An estimate: the error of the low-rank approximation of an equivalent rank.

        k atoms and s coefficients err at least as much as rank k and at most as much as rank s. On real weights
        the solver comes near the lower end, so the estimate is the tail of the energies, interpolated, at rank
        k - SPARSITY_COST (out / in)(k / s - 1)(k - s); it falls from level to level as the truth does. A dictionary
        that N weights share loses 1 - 1 / N of those ranks more, and all the more where k is as large as it may be.
        """
        energies, out = artefact["energies"], len(artefact["weight"])
        full = len(energies)
        tail = tail_energies(energies)
        shape = (out, artefact["weight"].shape[1])
        found = []
        for nonzeros in curve.ranks[:-1].tolist():
            atoms = min(self._atoms(shape, nonzeros), full)
            cost = min(SPARSITY_COST * min(shape[0] / shape[1], 2.0) * (self.options.k_over_s - 1), 1.0)
            wanted = max(self.options.k_over_s * nonzeros / atoms, 1.0)
            cost = min(cost + wanted * (1 - 1 / self.group), 1.0)
            rank = atoms - cost * (atoms - nonzeros)
            low = min(int(rank), full - 1)
            found.append(float(torch.lerp(tail[low], tail[low + 1], rank - low)))
        return torch.tensor([*found, 0.0], dtype=torch.float64)

    def total(self, artefact: dict[str, Tensor]) -> float:
        return float(artefact["energies"].sum())

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        shape = (site.shape[1], site.shape[0]) if self.options.by_input else site.shape
        parameters: dict[str, Any] = {"rank": rank, "atoms": self._atoms(shape, rank)}
        for key in ("coefficient_bits", "dictionary_bits"):
            if getattr(self.options, key) != 16:
                parameters[key] = getattr(self.options, key)
        adds_bias = self.metric == "centred"
        bias, added = adds_bias or site.bias, adds_bias and not site.bias
        form = TransposedDictionary.name if self.options.by_input else SparseDictionary.name
        return Spec(form, site.shape, bias, added, site.conv1d, parameters)

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        return encoded(self.options, spec, artefact, bias)

    def encode_together(
        self, specs: Sequence[Spec], artefacts: Sequence[dict[str, Tensor]], biases: Sequence[Tensor | None]
    ) -> list[dict[str, Tensor]]:
        if len(specs) == 1:
            return super().encode_together(specs, artefacts, biases)
        return encoded_together(self.options, specs, artefacts, biases)
