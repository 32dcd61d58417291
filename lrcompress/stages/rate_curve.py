"""What coded weights are predicted to lose, by how many bits they have."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from lrcompress.budget import bits_per_weight
from lrcompress.stages.allocate import Plan, allocated, summaries
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import Artefacts

Unit = Literal["nats", "relative"]
"""Of a predicted loss: nats a token that the loss on the calibration text would rise by, or the root of the squared
error, as a part of the weights' size, where the metric knows nothing of the loss."""

DRAWN = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Bits of a curve that is drawn."""

NATS = 0.5
"""Nats a token of a squared error in the metric of inputs and gradients: see `loss_of`."""

Known = dict[str, dict[str, Tensor]]


def unit_of(opened: Opened) -> Unit:
    """By what the method's metric knows."""
    return "nats" if opened.request.method.needs_gradients else "relative"


def loss_of(opened: Opened, errors: float, known: Known) -> float:
    """Of the squared errors of all weights together, in the unit of the metric; `known`: the weights' summaries.

    With gradients g of a token's loss and inputs x, its second-order rise is half of tr(E[g gᵀ] Δ E[x xᵀ] Δᵀ), summed
    over the weights, which is what their squared errors are (arXiv 1503.05671).
    """
    if opened.request.method.needs_gradients:
        return NATS * errors
    sizes = sum(float(summary["total"]) for summary in known.values())
    return float((errors / sizes) ** 0.5) if sizes > 0 else 0.0


def reach(opened: Opened) -> tuple[float, float]:
    """The fewest bits a weight that the method can store, and those of the dense weights."""
    curves = [choice.stored for choice in opened.costs()]
    total = sum(site.shape[0] * site.shape[1] for site in opened.sites)
    least, most = (bits_per_weight(sum(int(c.bytes[end]) for c in curves), total) for end in (0, -1))
    return least, most


def squared_errors(opened: Opened, known: Known) -> float:
    """Of all weights together, in the method's metric, as the request's amount leaves them; `known`: the summaries."""
    plan = allocated(opened, known)
    return sum(float(known[name]["errors"][level]) for name, level in plan.levels.items())


def predicted_loss(opened: Opened, plan: Plan, artefacts: Artefacts) -> float:
    """What a plan will lose, in the unit of `loss_of`."""
    known = summaries(opened, artefacts)
    return loss_of(opened, sum(float(known[name]["errors"][level]) for name, level in plan.levels.items()), known)


def losses(opened: Opened, known: Known, every: Sequence[float]) -> list[float]:
    """Predicted, at each of so many bits a weight."""
    found = []
    for bits in every:
        amount = {"bpw": bits, "ratio": None, "size": None, "max_loss": None}
        recipe = opened.request.recipe.model_copy(update=amount)
        asked = replace(opened, request=replace(opened.request, recipe=recipe))
        found.append(loss_of(opened, squared_errors(asked, known), known))
    return found


def rate_curve(opened: Opened, artefacts: Artefacts) -> dict[str, Any]:
    """The `rates` of report.json: points of bits a weight and the loss predicted there."""
    least, most = reach(opened)
    drawn, known = [bits for bits in DRAWN if least <= bits < most], summaries(opened, artefacts)
    points = zip(drawn, losses(opened, known, drawn), strict=True)
    return {"unit": unit_of(opened), "points": [list(point) for point in points]}
