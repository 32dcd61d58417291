"""CoSpaDi: sparse dictionaries learnt on whitened weights (arXiv 2509.22075), with the solvers of later work."""

from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from lrcompress.formats import spec_bytes
from lrcompress.formats.sparse_dictionary import SparseDictionary
from lrcompress.linalg.dictionary import least_squares_dictionary
from lrcompress.linalg.sparse_coding import solve
from lrcompress.linalg.truncation import decompose, tail_energies
from lrcompress.methods.base import METHODS, Method, MethodOptions
from lrcompress.protocols import Curve, InputStatistics, Site, Spec

Bits = Literal[8, 16]

SPARSITY_COST = 0.08
"""Share of the ranks between s and k that a sparse code loses against rank k, at k / s = 2, as measured on the demo."""


class CospadiOptions(MethodOptions):
    """Options of cospadi."""

    metric: Literal["plain", "input"] = "input"
    solver: Literal["htp", "procrustes", "ksvd"] = "htp"
    """htp: free dictionary, supports refined, coefficients by least squares; procrustes: COMPOT; ksvd: the paper."""
    k_over_s: float = pydantic.Field(2.0, ge=1.0, le=16.0)
    """Atoms of the dictionary per coefficient of an output."""
    rounds: int = pydantic.Field(24, ge=0)
    """Alternations of dictionary and codes (procrustes is published with 20, ksvd with 60)."""
    coefficient_bits: Bits = 16
    dictionary_bits: Bits = 16


@METHODS.register
class Cospadi(Method):
    """W ≈ S D with s coefficients per output, the error measured on the calibration inputs.

    The levels of a weight are numbers of coefficients s. Errors are not known before the solver has run, so they
    are estimated: see `errors`.
    """

    name: ClassVar[str] = "cospadi"
    title: ClassVar[str] = "CoSpaDi"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.22075"
    summary: ClassVar[str] = "sparse dictionary: a few atoms of its own choice for every output"
    Options: ClassVar[type[MethodOptions]] = CospadiOptions
    formats: ClassVar[tuple[str, ...]] = (SparseDictionary.name,)
    errors_are_exact: ClassVar[bool] = False

    options: CospadiOptions

    @property
    def metric(self) -> str:
        return self.options.metric

    def curve(self, site: Site, element_size: int) -> Curve:
        dense = site.shape[0] * site.shape[1] * element_size
        ranks, costs = [], []
        for nonzeros in range(1, min(site.shape)):
            cost = spec_bytes(self.spec(site, nonzeros, element_size), element_size)
            if cost >= dense:
                break
            ranks.append(nonzeros)
            costs.append(cost)
        return Curve(site.name, torch.tensor([*ranks, min(site.shape)]), torch.tensor([*costs, dense]), dense)

    def _atoms(self, shape: tuple[int, int], nonzeros: int) -> int:
        """Size of the dictionary for a number of coefficients; an orthonormal one has at most min(out, in) atoms."""
        limit = min(shape) if self.options.solver == "procrustes" else shape[0]
        return min(round(self.options.k_over_s * nonzeros), limit)

    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        """With W G^½ = P Σ Qᵀ only P and Σ matter to the solver: the rows of P Σ are those of W G^½, rotated."""
        gram = None if statistics is None or self.metric == "plain" else statistics.gram()
        spectrum = decompose(weight, gram)
        return {"weight": weight.float(), "left": spectrum.left.float(), "energies": spectrum.energies}

    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        """An estimate: the error of the low-rank approximation of an equivalent rank.

        k atoms and s coefficients err at least as much as rank k and at most as much as rank s. On real weights
        the solver comes near the lower end, so the estimate is the tail of the energies, interpolated, at rank
        k - SPARSITY_COST (k / s - 1)(k - s); it falls from level to level as the truth does.
        """
        energies, out = artefact["energies"], len(artefact["weight"])
        full = len(energies)
        tail = tail_energies(energies)
        shape = (out, artefact["weight"].shape[1])
        found = []
        for nonzeros in curve.ranks[:-1].tolist():
            atoms = min(self._atoms(shape, nonzeros), full)
            cost = min(SPARSITY_COST * (self.options.k_over_s - 1), 1.0)
            rank = atoms - cost * (atoms - nonzeros)
            low = min(int(rank), full - 1)
            found.append(float(torch.lerp(tail[low], tail[low + 1], rank - low)))
        return torch.tensor([*found, 0.0], dtype=torch.float64)

    def total(self, artefact: dict[str, Tensor]) -> float:
        return float(artefact["energies"].sum())

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        parameters: dict[str, Any] = {"rank": rank, "atoms": self._atoms(site.shape, rank)}
        for key in ("coefficient_bits", "dictionary_bits"):
            if getattr(self.options, key) != 16:
                parameters[key] = getattr(self.options, key)
        return Spec(SparseDictionary.name, site.shape, site.bias, conv1d=site.conv1d, parameters=parameters)

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        """Solve, and take the codes' least-squares dictionary of the weight itself: it needs no inverse of the Gram."""
        target = artefact["left"] * artefact["energies"].sqrt().float()
        atoms, nonzeros = spec.parameters["atoms"], spec.parameters["rank"]
        code = solve(target, atoms, nonzeros, self.options.solver, self.options.rounds)
        codes = code.codes.double()
        dictionary = least_squares_dictionary(artefact["weight"].double(), codes)
        scale = _balance(dictionary, codes)
        stored = dictionary * scale, codes / scale
        if not all(bool(torch.isfinite(t).all()) for t in stored):
            raise ArithmeticError("the sparse dictionary is not finite")
        return SparseDictionary.encode(spec, stored[0].float(), stored[1].float(), code.support, bias)


def _balance(dictionary: Tensor, codes: Tensor) -> Tensor:
    """One factor that makes both halves equally large, so that neither leaves the range of half precision."""
    sizes = dictionary.norm(), codes.norm()
    return (sizes[1] / sizes[0]).sqrt() if bool(sizes[0] > 0) and bool(sizes[1] > 0) else torch.ones_like(sizes[0])
