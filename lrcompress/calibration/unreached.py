"""Layers that no gradient of the loss reaches, as those that only choose tokens: what their errors count."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lrcompress.precision import widened
from lrcompress.protocols import InputStatistics, Site


def with_shares(
    sites: Sequence[Site], statistics: dict[str, InputStatistics], weight: Callable[[Site], Tensor]
) -> dict[str, InputStatistics]:
    """The statistics of a block, by site, with gradients for the sites that have none, marked as not `reached`.

    Their second moment becomes a multiple of the identity: the metric is then that of the inputs. The multiple gives
    the layer its share of the block's energy tr(Γ W G Wᵀ): as much for each of its numbers as the others have on
    average. A block without any has nothing to share, and zeros stay zeros. `weight` gives W (out, in).
    """
    inside = [site for site in sites if not site.lookup]  # a token is reached where its row is
    known = [(site, statistics[site.name]) for site in inside if site.name in statistics]
    reached = [(site, one) for site, one in known if bool((one.gradient_squares() > 0).any())]
    if len(reached) == len(known):
        return statistics
    numbers = sum(site.shape[0] * site.shape[1] for site, _ in reached)
    energy = sum(one.share * _energy(one, weight(site), one.gradients) for site, one in reached)
    found, names = dict(statistics), {site.name for site, _ in reached}
    for site, one in known:
        if site.name not in names:
            own = _energy(one, weight(site), None)
            wanted = energy * site.shape[0] * site.shape[1] / numbers if numbers else 0.0
            gradients = _alike(one.gradients, wanted / own if own > 0 else 0.0)
            found[site.name] = replace(one, gradients=gradients, reached=False)
    return found


def _alike(gradients: Tensor | None, value: float) -> Tensor:
    """A second moment, or its diagonal, like `gradients`, of outputs that all count `value`."""
    assert gradients is not None
    squares = torch.full((len(gradients),), value, dtype=gradients.dtype, device=gradients.device)
    return squares if gradients.dim() == 1 else torch.diag(squares)


def _energy(one: InputStatistics, weight: Tensor, gradients: Tensor | None) -> float:
    """tr(Γ W G Wᵀ) of W (out, in); Γ is the identity where there are no gradients, diagonal where these are (out,)."""
    weight = widened(weight.detach().to(one.second.device))
    if one.of_outputs:
        outputs = one.output_moment(weight)
        if gradients is not None and gradients.dim() == 2:
            return float((gradients * outputs).sum())
        return _weighed(outputs.diagonal(), gradients)
    seen = weight @ one.gram()
    if gradients is not None and gradients.dim() == 2:
        return float((gradients @ weight * seen).sum())
    return _weighed((weight * seen).sum(1), gradients)


def _weighed(squares: Tensor, gradients: Tensor | None) -> float:
    return float(squares.sum() if gradients is None else gradients @ squares)
