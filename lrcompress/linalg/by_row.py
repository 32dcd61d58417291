"""Rounding a matrix whose rows have metrics of their own, each a mixture of a few Grams: the rows are tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.linalg.two_sided import unit_factor
from lrcompress.precision import widened

GROUPS = 8
"""Of rows with about the same mixture, which have one factor: rows that differ in size alone have equal ones."""

BALANCED = 20
"""Rounds after which the weights' means are even."""

STRIP = 64
"""Columns that are rounded one by one; everything between strips is a matrix product."""


@dataclass(frozen=True)
class RowMetric:
    """What errors e (n,) of row v are weighed by: about weight[v] eᵀ M D Mᵀ e with the M and D of its group.

    weight (m,): the mean of the diagonal of a row's metric; group (m,) int64; factor (groups, n, n) unit upper
    triangular and diagonal (groups, n), of a metric of which that is 1, the columns in the order `by_column` (n,).
    All wide but the factors, which are float32.
    """

    weight: Tensor
    group: Tensor
    by_column: Tensor
    factor: Tensor
    diagonal: Tensor


def row_metric(parts: Sequence[tuple[Tensor, Tensor]], damping: float, groups: int = GROUPS) -> RowMetric:
    """The metric Σ shares[v] gram of every row v, over one or two `parts`: shares (m,), and gram (n, n), wide.

    Rows are put into groups by the first part's share of their metric, as many rows in each; a group has the mixture
    that its rows have on average. The columns' order is that of the largest in the mean over all rows.
    """
    scales = [gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny) for _, gram in parts]
    traces = torch.stack([shares * scale for (shares, _), scale in zip(parts, scales, strict=True)])
    weight = traces.sum(0).clamp_min(torch.finfo(traces.dtype).tiny)
    mixtures, group = _grouped(traces / weight, min(groups, len(weight)) if len(parts) > 1 else 1)
    unit = torch.stack([gram / scale for (_, gram), scale in zip(parts, scales, strict=True)])
    mean = torch.einsum("p,pij->ij", traces.sum(1) / weight.sum(), unit)
    by_column = mean.diagonal().argsort(descending=True)
    factors, diagonals = [], []
    for mixture in mixtures:
        factor, diagonal = unit_factor(torch.einsum("p,pij->ij", mixture, unit), damping, by_column)
        factors.append(factor.float())
        diagonals.append(widened(diagonal))
    return RowMetric(weight, group, by_column, torch.stack(factors), torch.stack(diagonals))


def _grouped(shares: Tensor, groups: int) -> tuple[list[Tensor], Tensor]:
    """Mean shares (parts,) of every group, and the group of every row, of shares (parts, m) that add up to 1."""
    order = shares[0].argsort()
    group = torch.empty_like(order)
    group[order] = torch.arange(len(order), device=order.device) * groups // len(order)
    return [shares[:, group == index].mean(1) for index in range(groups)], group


def balanced_scales(metric: RowMetric) -> tuple[Tensor, Tensor]:
    """Steps of rows (m,) and of columns (n,) with which every row's and every column's mean weight is 1.

    The weight of an entry in squared steps is weight[v] diagonal[group[v], j] rows[v]² columns[j]²; one would have all
    of them 1. Where the means are, a bit more for a row, or for a column, gains the same everywhere.
    """
    counts = torch.bincount(metric.group, minlength=len(metric.diagonal)).to(metric.diagonal)
    own = metric.diagonal.mean(1).reciprocal()  # squared, of a group's rows, for rows of weight 1
    columns = torch.ones_like(metric.diagonal[0])
    for _ in range(BALANCED):
        columns = counts.sum() / torch.einsum("g,g,gj->j", counts, own, metric.diagonal)
        own = (metric.diagonal * columns).mean(1).reciprocal()
    return (own[metric.group] / metric.weight).sqrt(), columns.sqrt()


def round_by_row(target: Tensor, right: Tensor, offset: Tensor, strip: int = STRIP) -> Tensor:
    """Codes K (m, n), whole numbers, for which (K - target) M is small entry after entry, from left to right.

    As `two_sided.round_two_sided` with nothing to tell one row from another: target (m, n) in steps, right M (n, n),
    offset (m, n).
    """
    n = target.shape[1]
    wanted, cut = target.T.contiguous(), offset.T.contiguous()
    error = torch.empty_like(wanted)
    codes = torch.empty_like(wanted)
    for start in range(0, n, strip):
        stop = min(start + strip, n)
        before = right[:start, start:stop].T @ error[:start]
        for column in range(start, stop):
            moved = wanted[column] - before[column - start]
            codes[column] = moved.abs().add_(cut[column]).floor_().copysign_(moved)
            error[column] = codes[column] - wanted[column]
            before[column - start + 1 :].addr_(right[column, column + 1 : stop], error[column])
    return codes.T.contiguous()
