"""Rounding a matrix of the vocabulary: a row is a token, and counts as often as its token does."""

import torch
from torch import Tensor

from lrcompress.formats.coded import Scales
from lrcompress.linalg.by_row import balanced_scales, round_by_row, row_metric
from lrcompress.linalg.rates import rates_by_row
from lrcompress.linalg.two_sided import expected_sizes, in_steps, offsets
from lrcompress.precision import wide, widened
from lrcompress.protocols import InputStatistics, Lookups, Site

SEEN_AT_LEAST = 3.0
"""Occurrences that are added to those of every token: calibration never meets most of a vocabulary."""

ROWS = 2**12
"""Rounded at a time."""


def token_parts(
    site: Site, weight: Tensor, statistics: InputStatistics | None, metric: str
) -> list[tuple[Tensor, Tensor]]:
    """Shares (out,) and Gram (in, in) wide of what the head, and of what the lookup, makes of a row's error.

    A head's row gives one logit: the mean square of the loss's gradient at it, and the inputs' second moment. A looked
    up row is a hidden state: how often it is looked up, and the second moment of the gradients there. Both are per
    token of the text, so that they add up, and a step means the same as for any other weight. Without gradients the
    two are in different units, and the lookup's is scaled to be worth as much for the whole matrix.
    """
    m, n = weight.shape
    dtype = wide(weight.device)
    ones = torch.ones(m, dtype=dtype, device=weight.device)
    identity = torch.eye(n, dtype=dtype, device=weight.device)
    if statistics is None or metric == "plain":
        return [(ones, identity)]
    parts = []
    if site.head is not None:
        logits = ones
        if metric == "two_sided":
            logits = statistics.gradient_squares() + SEEN_AT_LEAST / statistics.rows
        elif metric == "trace":
            logits = statistics.gradient_squares().mean() * ones
        parts.append((logits, statistics.gram(centred=metric == "centred")))
    if statistics.lookups is not None:
        parts.append(_looked_up(statistics.lookups, weight, parts, metric))
    return parts


def _looked_up(
    lookups: Lookups, weight: Tensor, head: list[tuple[Tensor, Tensor]], metric: str
) -> tuple[Tensor, Tensor]:
    """The part of the lookup beside that of the head, if there is one."""
    shares = (lookups.counts + SEEN_AT_LEAST) / lookups.counts.sum()
    if metric == "two_sided":
        assert lookups.gradients is not None
        return shares, lookups.gradients
    dtype = wide(weight.device)
    scale = torch.ones((), dtype=dtype, device=weight.device)
    if metric == "trace":
        assert lookups.gradients is not None
        scale = lookups.gradients.diagonal().mean()
    elif head:
        logits, inputs = head[0]
        scale = ((widened(weight) @ inputs) * weight).sum(1) @ logits / (widened(weight).square().sum(1) @ shares)
    return scale * shares, torch.eye(weight.shape[1], dtype=dtype, device=weight.device)


def decompose_tokens(weight: Tensor, parts: list[tuple[Tensor, Tensor]], damping: float) -> dict[str, Tensor]:
    """As Ecsq.decompose, for rows that are rounded by themselves: factors of groups, and the group of every row."""
    metric = row_metric(parts, damping)
    scales = Scales.nearest(*balanced_scales(metric))
    right = torch.stack([in_steps(factor, scales.columns) for factor in metric.factor])
    target = weight[:, metric.by_column].float() / scales.rows[:, None] / scales.columns
    total = energy_by_row(target, right, metric.group)
    return {
        "target": target,
        "right": right,
        "group": metric.group.to(torch.int16),
        "row": scales.rows,
        "column": scales.columns,
        "by_column": metric.by_column,
        "rates": rates_by_row(target, right, metric.group),
        "size": torch.tensor(total, dtype=torch.float64),
    }


def energy_by_row(target: Tensor, right: Tensor, group: Tensor) -> float:
    """Sum over the rows v of target (m, n) of |target[v] right[group[v]]|², of right (groups, n, n)."""
    carried = (target[rows] @ right[index] for index, rows in _rows(group))
    return sum(float(part.square_().sum(dtype=wide(part.device))) for part in carried)


def round_tokens(artefact: dict[str, Tensor], step: float) -> Tensor:
    """Codes (m, n) int32 of every row, its columns in their places, rounded with its group's feedback."""
    target, right = artefact["target"] / step, artefact["right"]
    cut = offsets(expected_sizes(target))
    codes = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    for group, rows in _rows(artefact["group"]):
        codes[rows] = round_by_row(target[rows], right[group], cut[rows]).to(torch.int32)
    found = torch.empty_like(codes)
    found[:, artefact["by_column"]] = codes
    return found


def _rows(group: Tensor) -> list[tuple[int, Tensor]]:
    """A group, and at most ROWS rows of it, until all are named."""
    members = [(index, (group == index).nonzero()[:, 0]) for index in range(int(group.max()) + 1)]
    return [(index, rows) for index, every in members for rows in every.split(ROWS)]
