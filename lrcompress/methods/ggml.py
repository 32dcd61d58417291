"""GGML: llama.cpp's own block types, their scales and codes found in the metric of what a layer reads and gives."""

from collections.abc import Collection, Mapping
from typing import ClassVar

import pydantic
import torch
from torch import Tensor

from lrcompress.formats.ggml import Ggml
from lrcompress.ggml.file_types import fitting
from lrcompress.ggml.rounding import DAMPING, OUTPUT_DAMPING, ROUNDS, round_weight
from lrcompress.ggml.types import BLOCK_TYPES, BlockType
from lrcompress.linalg.whitening import damped
from lrcompress.methods.base import METHODS, Method, MethodOptions
from lrcompress.methods.spectral import Metric
from lrcompress.precision import widened
from lrcompress.protocols import Curve, InputStatistics, Site, Spec

MIXED = ("IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0")
"""What a weight may get where a size is asked for, or falls back to: each errs far less than the one before."""


STEP = 28.0
"""Multiply-adds whose time a step of choosing codes takes: 6.7 s of a core for a block of SmolLM2 (docs/gguf.md)."""


class GgmlOptions(MethodOptions):
    """Options of ggml."""

    metric: Metric = "two_sided"
    imatrix: str | None = None
    """llama.cpp's importance matrix (.gguf or .dat) in the place of a metric: no calibration text is summed up."""
    damping: float = pydantic.Field(DAMPING, ge=0.0)
    """Added to the inputs' second moment, relative to its mean."""
    gradient_damping: float = pydantic.Field(OUTPUT_DAMPING, ge=0.0)
    """Added to the output gradients' second moment, relative to its mean (metric=two_sided)."""
    rounds: int = pydantic.Field(ROUNDS, ge=1)
    """How often every row is chosen again, given all others."""


@METHODS.register
class GgmlBlocks(Method):
    """W in blocks of the type that llama-quantize would give it, rounded as ggml/rounding.py says.

    Which type that is depends on the whole model and on the names that llama.cpp's converter gives its tensors: `types`
    by site is filled in before any curve is asked for (stages/block_types.py). Where a size is asked for it stays None,
    and every weight has a curve of types, with one price for the whole model. What is `left` stays dense here; `beside`
    are the bytes of the rest of the file, at most.
    """

    name: ClassVar[str] = "ggml"
    title: ClassVar[str] = "GGML blocks"
    paper: ClassVar[str] = "https://github.com/ggml-org/llama.cpp"
    summary: ClassVar[str] = "llama.cpp's own block types (-o FILE.gguf --type Q4_K_M), rounded to inputs and outputs"
    Options: ClassVar[type[MethodOptions]] = GgmlOptions
    formats: ClassVar[tuple[str, ...]] = (Ggml.name,)
    default_allocator: ClassVar[str] = "marginal_error"
    rounds = True
    options: GgmlOptions

    def __init__(self, options: MethodOptions, format: str | None = None, base: str | None = None) -> None:
        super().__init__(options, format, base)
        self.types: Mapping[str, str] | None = None
        self.importance: Mapping[str, Tensor] = {}
        self.left: Collection[str] = ()
        self.beside = 0

    @property
    def levels_by_name(self) -> bool:
        return True

    def _kinds(self, site: Site) -> list[BlockType]:
        """The types that the site may get, smallest first; none where it stays dense."""
        if site.name in self.left:
            return []
        if self.types is not None:
            kind = BLOCK_TYPES.get(self.types.get(site.name, ""))
            return [] if kind is None else [kind]
        fitted = [BLOCK_TYPES.get(fitting(name, site.shape[1])) for name in MIXED]
        return list({kind.bytes_of(*site.shape): kind for kind in fitted if kind is not None}.values())

    @property
    def metric(self) -> str:
        return self.options.metric if self.options.imatrix is None else "plain"

    @property
    def needs_gradient_gram(self) -> bool:
        return self.metric == "two_sided"

    def search_work(self, site: Site) -> float:
        m, n = site.shape
        return STEP * m * n * (3 * n + (m if self.metric == "two_sided" else 0))

    def curve(self, site: Site, element_size: int) -> Curve:
        dense = site.dense_bytes(element_size)
        costs = [kind.bytes_of(*site.shape) for kind in self._kinds(site)]
        costs = [cost for cost in costs if cost < dense]
        return Curve(site.name, torch.arange(len(costs) + 1), torch.tensor([*costs, dense]), dense)

    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        inputs, outputs = self._grams(site, weight, statistics)
        found, errors, rounds = {}, [], self.options.rounds
        for kind in self._kinds(site):
            blocks = round_weight(
                kind, weight, inputs, outputs, damping=self.options.damping, output_damping=0.0, rounds=rounds
            )
            found[f"blocks.{kind.name}"] = blocks
            errors.append(self._loss(widened(kind.dense(blocks)) - widened(weight), inputs, outputs))
        size = self._loss(widened(weight), inputs, outputs)
        return {**found, "error": torch.stack([*errors, torch.zeros_like(size)]), "size": size}

    def _grams(
        self, site: Site, weight: Tensor, statistics: InputStatistics | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(in, in) and (out, out) wide: what errors of inputs and outputs are weighed by, None where all alike."""
        if site.name in self.importance:
            return torch.diag(widened(self.importance[site.name].to(weight.device))), None
        if statistics is None or not self.needs_statistics:
            return None, None
        inputs = statistics.gram(centred=self.metric == "centred")
        if self.metric == "trace":
            inputs = inputs * statistics.gradient_squares().mean()
        if self.metric != "two_sided":
            return inputs, None
        assert statistics.gradients is not None
        return inputs, damped(statistics.gradients, self.options.gradient_damping)

    @staticmethod
    def _loss(error: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
        weighted = error if inputs is None else error @ inputs
        return ((weighted if outputs is None else outputs @ weighted) * error).sum().clamp_min(0)

    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        """A type that errs more than a smaller one, as may be where one input is huge, counts as that one."""
        error: Tensor = artefact["error"]
        return torch.cat([error[: len(curve.ranks) - 1].cummin(0).values, error[-1:]])

    def total(self, artefact: dict[str, Tensor]) -> float:
        return float(artefact["size"])

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        kind = self._kinds(site)[rank]
        return Spec(Ggml.name, site.shape, site.bias, False, site.conv1d, {"type": kind.name})

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        return Ggml.encode(artefact[f"blocks.{spec.parameters['type']}"], bias)
