"""CoSpaDi: sparse dictionaries learnt on whitened weights (arXiv 2509.22075), with the solvers of later work."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.formats import spec_bytes
from lrcompress.formats.sparse_dictionary import SparseDictionary, dequantised, quantised
from lrcompress.formats.transposed_dictionary import TransposedDictionary
from lrcompress.kernels.pursuit import pursuit_for
from lrcompress.linalg.coupled import coupled_htp
from lrcompress.linalg.dictionary import SparseCode, least_squares_dictionary, refitted_codes
from lrcompress.linalg.joint import FINAL_STEPS, SharedDictionary, joint_htp
from lrcompress.linalg.sparse_coding import solve
from lrcompress.linalg.truncation import decompose, tail_energies
from lrcompress.linalg.whitening import damped, upper_root
from lrcompress.methods.base import METHODS, Method, MethodOptions
from lrcompress.methods.dictionary_options import CospadiOptions
from lrcompress.protocols import Curve, InputStatistics, Site, Spec

SPARSITY_COST = 0.07
"""Share of the ranks between s and k that a sparse code loses against rank k, per k / s - 1 and per out / in, that at
most 2: on the demo and synthetic weights, at k / s = 2.5, 0.13 where out / in is 2.7, 0.08 at 1 and 0.02 at 0.4."""

COUPLED_ROUNDS = 3
"""Nine tenths of what twelve gain."""

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
        if self.options.coupled_rounds and self.metric != "two_sided" and not self._by_input:
            raise InputError(f"coupled_rounds need the gradients' Gram, metric {self.metric} has none: use two_sided")
        if self.coupled_rounds and (self.group > 1 or self.keeps_gram or self.options.coefficient_bits == 8):
            raise InputError("side=input and coupled_rounds are for 16 bits and a dictionary that nobody shares")

    @property
    def coupled_rounds(self) -> int:
        """Rounds in the full Gram of the rows that are coded."""
        if self.options.coupled_rounds is None:
            apart = self.group == 1 and not self.keeps_gram and self.options.coefficient_bits == 16
            return COUPLED_ROUNDS if self._by_input or (self.metric == "two_sided" and apart) else 0
        return self.options.coupled_rounds

    @property
    def _by_input(self) -> bool:
        return self.options.side == "input"

    @property
    def metric(self) -> str:
        return self.options.metric

    @property
    def group(self) -> int:
        return self.options.group

    @property
    def needs_gradient_gram(self) -> bool:
        return self.metric == "two_sided" and (self._by_input or self.coupled_rounds > 0)

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
        if self._by_input:
            return self._decompose_by_input(weight.double(), gram, statistics)
        roots = self._output_roots(weight, statistics)
        spectrum = decompose(weight.double() * roots[:, None], gram)
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
        rows = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
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
        """(out, out) float64: the damped Gram of the gradients; None where it is not asked for, or zero."""
        if not self.needs_gradient_gram or statistics is None or not bool((statistics.gradient_squares() > 0).any()):
            return None
        assert statistics.gradients is not None
        return damped(statistics.gradients, self.options.gradient_damping)

    @property
    def keeps_gram(self) -> bool:
        """A rounded or a shared dictionary is no combination of the weight's rows, so it needs the Gram itself."""
        return self.options.dictionary_bits == 8 or self.group > 1

    def _output_roots(self, weight: Tensor, statistics: InputStatistics | None) -> Tensor:
        """(out,) float64: the diagonal of R, all ones where the metric has no gradients, or these are zero."""
        ones = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
        if not self.needs_gradients or statistics is None:
            return ones
        squares = statistics.gradient_squares().double()
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
        shape = (site.shape[1], site.shape[0]) if self._by_input else site.shape
        parameters: dict[str, Any] = {"rank": rank, "atoms": self._atoms(shape, rank)}
        for key in ("coefficient_bits", "dictionary_bits"):
            if getattr(self.options, key) != 16:
                parameters[key] = getattr(self.options, key)
        adds_bias = self.metric == "centred"
        bias, added = adds_bias or site.bias, adds_bias and not site.bias
        form = TransposedDictionary.name if self._by_input else SparseDictionary.name
        return Spec(form, site.shape, bias, added, site.conv1d, parameters)

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        """Solve, and take the codes' least-squares dictionary of the weight itself: it needs no inverse of the Gram."""
        target = artefact["left"] * artefact.get("diagonal", artefact["energies"]).sqrt().float()
        atoms, nonzeros = spec.parameters["atoms"], spec.parameters["rank"]
        code = solve(target, atoms, nonzeros, self.options.solver, *self.options.limits, pursuit_for(target))
        if "rows" in artefact:
            return self._coupled(spec, artefact, target, code, bias)
        roots, weight = artefact["roots"][:, None], artefact["weight"].double()
        codes = code.codes.double()
        dictionary = least_squares_dictionary(roots * weight, codes)
        codes = codes / roots
        scale = _balance(dictionary, codes)
        dictionary, codes = dictionary * scale, codes / scale
        if self.options.dictionary_bits == 8:
            codes = self._refitted_codes(artefact, rounded(dictionary, 8), codes, code.support)
        elif self.options.coefficient_bits == 8:
            dictionary = least_squares_dictionary(roots * weight, roots * rounded(codes, 8))
        return self._stored(spec, artefact, dictionary, codes, code.support, bias)

    def _coupled(
        self, spec: Spec, artefact: dict[str, Tensor], target: Tensor, code: SparseCode, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """`encode`, from a code in the diagonal metric on, in that of the full Gram."""
        roots, rows = artefact["roots"][:, None].float(), artefact["rows"]
        unit = rows.diagonal().mean()
        start = SparseCode(code.dictionary, code.codes / roots, code.support)
        code = coupled_htp(target / roots, rows / unit, start, spec.parameters["rank"], self.coupled_rounds)
        root = upper_root(rows)
        codes = code.codes.double()
        dictionary = least_squares_dictionary(root @ artefact["weight"].double(), root @ codes)
        scale = _balance(dictionary, codes)
        return self._stored(spec, artefact, dictionary * scale, codes / scale, code.support, bias)

    def encode_together(
        self, specs: Sequence[Spec], artefacts: Sequence[dict[str, Tensor]], biases: Sequence[Tensor | None]
    ) -> list[dict[str, Tensor]]:
        """One dictionary for all: `joint_htp`, then as in `encode`."""
        if len(specs) == 1:
            return super().encode_together(specs, artefacts, biases)
        roots = [a["roots"][:, None] for a in artefacts]
        weights = [r * a["weight"].double() for r, a in zip(roots, artefacts, strict=True)]
        grams = [a["gram"] if "gram" in a else None for a in artefacts]
        # One factor for all weights, so that sums in float32 begin near 1.
        unit = torch.stack([w.square().mean() for w in weights]).mean().sqrt().clamp_min(1e-30)
        scaled = [(w / unit).float() for w in weights]
        atoms, nonzeros = specs[0].parameters["atoms"], specs[0].parameters["rank"]
        code = joint_htp(scaled, grams, atoms, nonzeros, *self.options.limits, pursuit_for(scaled[0]))
        exact = SharedDictionary(weights, [g if g is None else g.double() for g in grams])
        codes = [c.double() for c in code.codes]
        dictionary = exact.solve(codes, code.dictionary.double() * unit, FINAL_STEPS)
        scale = _balance(dictionary, torch.cat(codes))
        dictionary = dictionary * scale
        codes = [c / r / scale for c, r in zip(codes, roots, strict=True)]
        if self.options.dictionary_bits == 8:
            changed = rounded(dictionary, 8)
            codes = [
                self._refitted_codes(a, changed, c, s) for a, c, s in zip(artefacts, codes, code.supports, strict=True)
            ]
        elif self.options.coefficient_bits == 8:
            few = [r * rounded(c, 8) for r, c in zip(roots, codes, strict=True)]
            dictionary = exact.solve(few, dictionary, FINAL_STEPS)
        return [
            self._stored(spec, artefact, dictionary, c, support, bias)
            for spec, artefact, c, support, bias in zip(specs, artefacts, codes, code.supports, biases, strict=True)
        ]

    def _refitted_codes(
        self, artefact: dict[str, Tensor], dictionary: Tensor, codes: Tensor, support: Tensor
    ) -> Tensor:
        """Codes (out, k) that are the best in the metric for a dictionary (k, in) that has been changed."""
        seen = dictionary if "gram" not in artefact else dictionary @ artefact["gram"].double()
        return refitted_codes(seen @ dictionary.T, artefact["weight"].double() @ seen.T, codes, support)

    def _stored(
        self,
        spec: Spec,
        artefact: dict[str, Tensor],
        dictionary: Tensor,
        codes: Tensor,
        support: Tensor,
        bias: Tensor | None,
    ) -> dict[str, Tensor]:
        if not all(all_finite(t) for t in (dictionary, codes)):
            raise ArithmeticError("the sparse dictionary is not finite")
        if "mean" in artefact:
            left = rounded(codes, self.options.coefficient_bits)
            right = rounded(dictionary, self.options.dictionary_bits)
            weight, mean = artefact["weight"].double(), artefact["mean"]
            if self._by_input:
                weight, left, right = weight.T, right.T, left.T
            moved = weight @ mean - left @ (right @ mean)
            bias = (moved if bias is None else bias.double() + moved).float()
        form = TransposedDictionary if self._by_input else SparseDictionary
        return form.encode(spec, dictionary.float(), codes.float(), support, bias)


def rounded(values: Tensor, bits: int) -> Tensor:
    """Float64 rows of `values` as they are stored with `bits` bits; zeros stay zeros."""
    return dequantised(quantised(values.float(), bits)).double()


def _balance(dictionary: Tensor, codes: Tensor) -> Tensor:
    """One factor that makes both halves equally large, so that neither leaves the range of half precision."""
    sizes = dictionary.norm(), codes.norm()
    return (sizes[1] / sizes[0]).sqrt() if bool(sizes[0] > 0) and bool(sizes[1] > 0) else torch.ones_like(sizes[0])
