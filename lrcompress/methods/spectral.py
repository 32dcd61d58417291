"""The family of low-rank methods: one decomposition under different metrics, formats and allocators."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from lrcompress.formats import DENSE, FORMATS, spec_bytes
from lrcompress.formats.low_rank import LowRank
from lrcompress.formats.pivoted import Pivoted
from lrcompress.linalg.truncation import FEW, OVERSAMPLING, Spectrum, decompose, leading, retruncate, tail_energies
from lrcompress.linalg.whitening import damped
from lrcompress.methods.base import Method, MethodOptions
from lrcompress.methods.joining import encode_joined, joined, with_mean
from lrcompress.precision import exact
from lrcompress.protocols import Curve, InputStatistics, Site, Spec

Metric = Literal["plain", "input", "centred", "trace", "two_sided"]


class SpectralOptions(MethodOptions):
    """What every low-rank method may be asked."""

    metric: Metric = "input"
    gradient_damping: float = pydantic.Field(0.1, ge=0.0)
    """Added to the gradient Gram's eigenvalues, relative to their mean (metric=two_sided)."""


class JoiningOptions(SpectralOptions):
    """Options of the methods that may give several weights one right factor."""

    join: Literal["none", "auto"] = "none"
    """auto: weights of one input, and equal ones of neighbouring blocks, share it where they then err less at no more
    bytes."""


class SpectralMethod(Method):
    """W ≈ left @ right, truncated to the level that the allocator chooses.

    metric `plain` preserves the weights, `input` the outputs on the calibration inputs, `centred` their deviation
    from the mean, the mean itself being carried by a bias. `two_sided` preserves the outputs as far as the loss feels
    them, by the Gram of its gradients (KFAC-SVD); `trace` knows only that Gram's mean eigenvalue, one number a weight.
    """

    Options: ClassVar[type[MethodOptions]] = SpectralOptions
    formats: ClassVar[tuple[str, ...]] = ("auto", "low_rank", "pivoted")
    levels_are_ranks: bool = True
    retruncates: bool = True

    @property
    def metric(self) -> str:
        return str(self.options.metric)  # type: ignore[attr-defined]

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """The highest rank that is stored factorised; above it the weight stays dense."""
        return min(shape)

    def curve(self, site: Site, element_size: int) -> Curve:
        adds_bias = self._adds_bias(site)
        stored = _candidates(self.format, site.shape, adds_bias, adds_bias and not site.bias, element_size)
        limit = self.largest_rank(site.shape)
        dense = site.shape[0] * site.shape[1] * element_size
        last = Spec(DENSE, site.shape) if site.stored is None else site.stored
        full = min(last.rank, *site.shape)  # a shared rank may be higher
        most, limit = spec_bytes(last, element_size), min(limit, full)
        # A bias that is added costs bytes too, so a small or thin weight can have no level below dense.
        useful = [(rank, bytes_) for rank, bytes_, _ in stored if rank <= limit and bytes_ < most]
        ranks, costs = [r for r, _ in useful], [b for _, b in useful]
        return Curve(site.name, torch.tensor([*ranks, full]), torch.tensor([*costs, most]), dense)

    def _adds_bias(self, site: Site) -> bool:
        """Whether a weight gets a bias that a dense layer need not have, or has got one before."""
        return self.metric == "centred" or (site.stored is not None and site.stored.added_bias)

    def centres(self, site: Site) -> bool:
        """Whether a bias carries what the site's inputs give on average."""
        return self.metric == "centred"

    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        outputs = self.output_gram(statistics)
        if statistics is not None and statistics.of_outputs:
            moment = statistics.output_moment(weight, centred=self.centres(site))
            spectrum = decompose(weight, None, outputs, output_moment=moment)
        else:
            spectrum = self._spectrum(site, weight, self._input_gram(site, statistics), outputs)
        return self._artefact(site, spectrum, weight, statistics)

    def _spectrum(self, site: Site, weight: Tensor, gram: Tensor | None, outputs: Tensor | None) -> Spectrum:
        """Of all ranks, or up to the one that is known, where that is small."""
        rank = site.known_rank
        if rank is None or self.joins(site) or FEW * (rank + OVERSAMPLING) > min(site.shape):
            return decompose(weight, gram, outputs)
        return leading(weight, rank, gram, outputs)

    def decompose_product(
        self, site: Site, left: Tensor, right: Tensor, statistics: InputStatistics | None
    ) -> dict[str, Tensor]:
        spectrum = retruncate(left, right, self._input_gram(site, statistics), self.output_gram(statistics))
        return self._artefact(site, spectrum, left @ right, statistics)

    def _input_gram(self, site: Site, statistics: InputStatistics | None) -> Tensor | None:
        if statistics is None or self.metric == "plain":
            return None
        return statistics.gram(centred=self.centres(site))

    def _artefact(
        self, site: Site, spectrum: Spectrum, weight: Tensor, statistics: InputStatistics | None
    ) -> dict[str, Tensor]:
        energies = spectrum.energies * self.output_scale(statistics)
        artefact = {"left": spectrum.left.float(), "right": spectrum.right.float(), "energies": energies}
        if self.joins(site):
            gram = self._input_gram(site, statistics)
            artefact |= {} if gram is None else {"gram": gram.float()}
        if self.centres(site) and statistics is not None:
            mean = statistics.mean()
            if self.joins(site):
                artefact["mean"] = mean
            artefact["mean_output"] = exact(weight) @ mean
            artefact["mean_latent"] = exact(spectrum.right) @ mean
        return artefact

    def outputs_suffice(self, site: Site) -> bool:
        """Of a wide weight W only W G Wᵀ enters, the outputs' second moment, as LoRD and AFM have it."""
        as_it_is = site.stored is None and not self.options.toward_dense and not self.joins(site)
        return self.needs_statistics and as_it_is and site.shape[0] < site.shape[1]

    @property
    def keeps_gram(self) -> bool:
        return getattr(self.options, "join", "none") == "auto" and self.metric != "plain"

    def joins(self, site: Site) -> bool:
        return getattr(self.options, "join", "none") == "auto" and site.stored is None

    def joint_spec(self, site: Site, rank: int, element_size: int) -> Spec:
        bias = self._adds_bias(site)
        parameters = {"rank": rank}
        return Spec(LowRank.name, site.shape, bias or site.bias, bias and not site.bias, site.conv1d, parameters)

    def owner_spec(self, site: Site, rank: int, element_size: int) -> Spec:
        """Pivoted where the format allows it: its pivot rows are everyone's right factor."""
        spec = self.joint_spec(site, rank, element_size)
        if self.format == LowRank.name or rank >= site.shape[0]:
            return spec
        pivoted = replace(spec, format=Pivoted.name)
        return min(spec, pivoted, key=lambda one: spec_bytes(one, element_size)) if self.format == "auto" else pivoted

    def encode_together(
        self, specs: Sequence[Spec], artefacts: Sequence[dict[str, Tensor]], biases: Sequence[Tensor | None]
    ) -> list[dict[str, Tensor]]:
        if len(specs) == 1:
            return super().encode_together(specs, artefacts, biases)
        return encode_joined(specs, artefacts, biases, joined(artefacts))

    @property
    def needs_gradient_gram(self) -> bool:
        return self.metric == "two_sided"

    def output_gram(self, statistics: InputStatistics | None) -> Tensor | None:
        """(out, out) metric of the outputs, None where every direction counts the same."""
        if not self.needs_gradient_gram:
            return None
        if statistics is None or statistics.gradients is None:
            raise ValueError(f"metric {self.metric} needs the gradients of the loss")
        return damped(statistics.gradients, self.options.gradient_damping)  # type: ignore[attr-defined]

    def output_scale(self, statistics: InputStatistics | None) -> float:
        """How much this weight's errors count beside those of others: its mean gradient energy in metric `trace`."""
        if self.metric != "trace" or statistics is None:
            return 1.0
        return float(statistics.gradient_squares().mean())

    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        errors = tail_energies(artefact["energies"])[curve.ranks]
        errors[-1] = 0.0
        return errors

    def total(self, artefact: dict[str, Tensor]) -> float:
        return float(artefact["energies"].sum())

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        adds_bias = self._adds_bias(site)
        added = adds_bias and not site.bias
        stored = _candidates(self.format, site.shape, adds_bias, added, element_size)
        if not 1 <= rank <= len(stored):
            raise ValueError(f"{site.name} has no level of rank {rank}")
        return Spec(stored[rank - 1][2], site.shape, adds_bias or site.bias, added, site.conv1d, {"rank": rank})

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        rank = spec.parameters["rank"]
        left, right = artefact["left"][:, :rank], artefact["right"][:rank]
        if "mean_output" in artefact:
            bias = with_mean(bias, artefact, exact(left) @ artefact["mean_latent"][:rank])
        return FORMATS.get(spec.format).encode(left, right, bias)  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _candidates(
    format: str, shape: tuple[int, int], bias: bool, added_bias: bool, element_size: int
) -> list[tuple[int, int, str]]:
    """(rank, bytes, format name) for all ranks from 1 on, in the cheapest of the formats that `format` allows."""
    names = ["low_rank", "pivoted"] if format == "auto" else [format]
    stored = []
    for rank in range(1, min(shape) + 1):
        options = []
        for name in names:
            if name == "pivoted" and rank == shape[0]:
                continue  # every row would be a pivot: that is the dense matrix
            spec = Spec(name, shape, bias, added_bias, parameters={"rank": rank})
            options.append((spec_bytes(spec, element_size), name))
        if options:
            bytes_, name = min(options)
            stored.append((rank, bytes_, name))
    return stored
