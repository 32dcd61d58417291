"""ECSQ: rounding with feedback to both sides, one step for the whole model, codes through an entropy coder."""

import math
from typing import ClassVar

import numpy as np
import pydantic
import torch
from torch import Tensor

from lrcompress.formats.coded import Coded, Scales
from lrcompress.formats.table import Table
from lrcompress.kernels.feedback import tiles_for
from lrcompress.linalg.rates import rates_of
from lrcompress.linalg.triangular import energy_between
from lrcompress.linalg.two_sided import expected_sizes, in_steps, offsets, round_two_sided, unit_factor
from lrcompress.methods.base import METHODS, Method, MethodOptions
from lrcompress.methods.spectral import Metric
from lrcompress.methods.tokens import decompose_tokens, energy_by_row, round_tokens, token_parts
from lrcompress.precision import wide, widened
from lrcompress.protocols import Curve, InputStatistics, Site, Spec

BITS = [*(0.05 * k for k in range(1, 40)), *(2 + k / 16 for k in range(168))]
"""Bits a weight of a curve's levels, the scales aside: 0.05 to 12.4."""


class EcsqOptions(MethodOptions):
    """Options of ecsq."""

    metric: Metric = "two_sided"
    damping: float = pydantic.Field(0.01, ge=0.0)
    """Added to the inputs' second moment, relative to its mean."""
    gradient_damping: float = pydantic.Field(0.1, ge=0.0)
    """Added to the output gradients' second moment, relative to its mean (metric=two_sided)."""


@METHODS.register
class Ecsq(Method):
    """W ≈ row scale ∘ integers ∘ column scale, the integers' entropy being what is stored.

    The loss tr(C_g E C_x Eᵀ) of E = Ŵ - W is Σ D_g,i D_x,j T_ij² (linalg/two_sided.py), and the step of entry (i, j) is
    one number for the whole model over sqrt(D_g,i D_x,j): every entry then adds the same to the loss per bit, as
    WaterSIC has it for the inputs' side (arXiv 2603.04956). A curve's level is a number of bits; equal slopes of all
    curves are equal steps.
    """

    name: ClassVar[str] = "ecsq"
    title: ClassVar[str] = "ECSQ"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.04956"
    summary: ClassVar[str] = "entropy-coded integers, rounded with feedback to inputs and outputs, one step for all"
    Options: ClassVar[type[MethodOptions]] = EcsqOptions
    formats: ClassVar[tuple[str, ...]] = ("coded",)
    default_allocator: ClassVar[str] = "marginal_error"
    sizes_are_estimates = True
    rounds = True
    takes_tokens = True
    cut = 0.125
    errors_are_exact = False
    options: EcsqOptions

    @property
    def metric(self) -> str:
        return self.options.metric

    @property
    def needs_gradient_gram(self) -> bool:
        return self.metric == "two_sided"

    def curve(self, site: Site, element_size: int) -> Curve:
        dense = site.dense_bytes(element_size)
        costs = [Coded.beside(site.shape) + self._length(site.shape, bits) for bits in BITS]
        levels = [level for level, cost in enumerate(costs) if cost < dense and cost > ([0, *costs][level])]
        ranks = torch.tensor([*levels, len(BITS)])
        return Curve(site.name, ranks, torch.tensor([*(costs[level] for level in levels), dense]), dense)

    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        if site.of_tokens:
            return decompose_tokens(weight, token_parts(site, weight, statistics, self.metric), self._damping)
        inputs, gradients = self._grams(weight, statistics)
        by_column, by_row = inputs.diagonal().argsort(descending=True), gradients.diagonal().argsort(descending=True)
        left, row = unit_factor(gradients, self._gradient_damping, by_row)
        right, column = unit_factor(inputs, self._damping, by_column)
        scales = Scales.nearest(row.rsqrt(), column.rsqrt())
        row, column = widened(scales.rows), widened(scales.columns)
        target = widened(weight)[by_row][:, by_column] / row[:, None] / column
        target = target.float()
        left, right = in_steps(left, row), in_steps(right, column)
        return {
            "target": target,
            "left": left,
            "right": right,
            "row": row.float(),
            "column": column.float(),
            "by_row": by_row,
            "by_column": by_column,
            "rates": rates_of(target, left, right),
            "size": energy_between(left, target, right),
        }

    @property
    def _damping(self) -> float:
        return self.options.damping if self.needs_statistics else 0.0

    @property
    def _gradient_damping(self) -> float:
        return self.options.gradient_damping if self.needs_gradient_gram else 0.0

    def _grams(self, weight: Tensor, statistics: InputStatistics | None) -> tuple[Tensor, Tensor]:
        """(in, in) and (out, out) wide: what an error of the inputs, and of the outputs, is weighed by."""
        m, n = weight.shape
        dtype = wide(weight.device)
        own = torch.eye(m, dtype=dtype, device=weight.device)
        if statistics is None or not self.needs_statistics:
            return torch.eye(n, dtype=dtype, device=weight.device), own
        inputs = statistics.gram(centred=self.metric == "centred")
        if self.metric == "two_sided":
            assert statistics.gradients is not None
            own = statistics.gradients
        elif self.metric == "trace":
            own = own * statistics.gradient_squares().mean()
        return inputs, own

    @staticmethod
    def _length(shape: tuple[int, int], bits: float) -> int:
        """Bytes, about, of a stream of so many bits an entry."""
        return math.ceil(bits * shape[0] * shape[1] / 8) + _overhead(shape)

    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        """Expected ones: the squared error of the step that makes as many bits; of fewer than any does, that of zeros.

        Where feedback carries much, the coarsest step still makes codes.
        """
        bits, _, errors = artefact["rates"]
        asked = torch.tensor([BITS[level] for level in curve.ranks[:-1].tolist()], dtype=torch.float64)
        steps = torch.tensor([_interpolated(each, bits, errors.log2()) for each in asked.tolist()]).double().exp2()
        found = torch.where(asked < float(bits[-1]), float(artefact["size"]), steps)
        return torch.cat([found.cummin(0).values, torch.zeros(1, dtype=torch.float64)])

    def total(self, artefact: dict[str, Tensor]) -> float:
        return float(artefact["size"])

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        parameters = {"length": self._length(site.shape, BITS[rank])}
        name = Table.name if site.lookup else Coded.name
        return Spec(name, site.shape, site.bias, False, site.conv1d, parameters)

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        """The stream is about as long as the spec says, not exactly: the step is that of the length.

        A length that is far too short for any step makes zeros.
        """
        target = artefact["target"]
        bits, steps, _ = artefact["rates"]
        wanted = 8 * (spec.parameters["length"] - _overhead(spec.shape)) / target.numel()
        step = 2.0 ** _interpolated(wanted, bits, steps)
        if wanted < float(bits[-1]) / 2:
            target = torch.zeros_like(target)
        if "group" in artefact:
            scales = Scales(artefact["row"] * step, _unsorted(artefact["column"], artefact["by_column"]))
            codes = round_tokens({**artefact, "target": target}, step)
            return Table.encode(codes, scales) if spec.format == Table.name else Coded.encode(codes, scales, bias)
        scaled = target / step
        factors, cut = (artefact["left"], artefact["right"]), offsets(expected_sizes(scaled))
        rounded = round_two_sided(scaled, *factors, cut, tiles_for(scaled))
        codes = torch.empty_like(rounded)
        by_row, by_column = artefact["by_row"], artefact["by_column"]
        codes[by_row[:, None], by_column] = rounded
        scales = Scales(_unsorted(artefact["row"] * step, by_row), _unsorted(artefact["column"], by_column))
        return Coded.encode(codes.to(torch.int32), scales, bias)


def weight_of(artefact: dict[str, Tensor]) -> Tensor:
    """(out, in) float32: the weight that was decomposed."""
    found = artefact["target"] * artefact["row"][:, None] * artefact["column"]
    found = _unsorted(found.T, artefact["by_column"]).T
    return found if "group" in artefact else _unsorted(found, artefact["by_row"])


def relative_error_of(artefact: dict[str, Tensor], weight: Tensor, inputs: Tensor | None = None) -> float:
    """Squared error in the metric, over the squared size, of a `weight` (out, in) in the decomposed one's place.

    inputs (in, in): a second moment in the place of the metric's own; of tokens there is none.
    """
    error = widened(weight) - weight_of(artefact)
    if artefact["size"] <= 0:
        return 0.0
    if "group" in artefact:
        error = (error[:, artefact["by_column"]] / artefact["row"][:, None] / artefact["column"]).float()
        return energy_by_row(error, artefact["right"], artefact["group"]) / float(artefact["size"])
    error = error[artefact["by_row"]] / artefact["row"][:, None]
    if inputs is None:
        error = (error[:, artefact["by_column"]] / artefact["column"]).float()
        return float(energy_between(artefact["left"], error, artefact["right"]) / artefact["size"])
    carried = artefact["left"].T @ error.float()
    return float(widened((carried @ inputs.float()) * carried).sum() / artefact["size"])


def _unsorted(values: Tensor, order: Tensor) -> Tensor:
    """Of values (n, ...) in the `order` (n,) of places, those in the places' own order."""
    found = torch.empty_like(values)
    found[order] = values
    return found


def _interpolated(bits: float, rates: Tensor, values: Tensor) -> float:
    """Of values (steps,) at decreasing `rates` (steps,), the one at `bits`; beyond them the outermost."""
    return float(np.interp(bits, rates.flip(0).cpu().numpy(), values.flip(0).cpu().numpy()))


def _overhead(shape: tuple[int, int]) -> int:
    """Bytes of a stream that code no entries, about: header, tables, the energies of rows and columns."""
    return 90 + sum(shape) // 3
