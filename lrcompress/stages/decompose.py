"""The decompositions of a block's weights, with what allocation needs beside them."""

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lrcompress.calibration.collect import token_weights
from lrcompress.calibration.routing import complete
from lrcompress.calibration.unreached import with_shares
from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.errors import InputError, NumericalError
from lrcompress.linalg.truncation import singular_values
from lrcompress.linalg.whitening import aimed, check_gram
from lrcompress.methods import Method
from lrcompress.model.device import release_freed
from lrcompress.parallel.processes import processes
from lrcompress.parallel.side_by_side import AT_ONCE, side_by_side
from lrcompress.precision import split
from lrcompress.protocols import InputStatistics, Site
from lrcompress.report.progress import Reporter
from lrcompress.stages.opened import Opened

AIM_DAMPING = 0.01
"""Of the Gram that a weight's aim at the dense model is solved with, relative to its mean eigenvalue."""

UNREACHED = "unreached"
"""An artefact has this tensor where the loss has no gradient at the layer."""

Found = dict[str, dict[str, Tensor]]
"""The artefacts of a block: site name to tensors."""


def decompose_block(
    opened: Opened,
    block: int,
    statistics: dict[str, InputStatistics],
    reporter: Reporter,
    ranks: Mapping[str, int] | None = None,
) -> Found:
    """The artefacts of a loaded block's sites; statistics come per site, or per group where those are equal.

    ranks: of the sites by name, where they are decided already.
    """
    found: Found = {}
    sites = [site if ranks is None else replace(site, known_rank=ranks[site.name]) for site in opened.sites_of(block)]
    if statistics and opened.experts:
        statistics = complete(sites, statistics, opened.experts, _tokens(opened))
    if statistics and opened.request.method.needs_gradients:
        statistics = with_shares(sites, statistics, lambda site: weight_of(opened, site))
    mine = [sites[place] for place in processes().own([decomposition_cost(site) for site in sites])]

    def decomposed(site: Site) -> tuple[dict[str, Tensor], float]:
        start = time.perf_counter()
        own = statistics.get(site.name, statistics.get(site.group))
        artefact = decompose_site(opened, site, own)
        if own is not None and not own.reached:
            artefact[UNREACHED] = torch.ones(())
        if double_bytes(site) > AT_ONCE:
            release_freed()
        return artefact, time.perf_counter() - start

    with reporter.timed("decompose"):
        results = side_by_side(decomposed, mine, double_bytes, opened.walker.device)
    for site, (artefact, seconds) in zip(mine, results, strict=True):
        found[site.name] = artefact
        reporter.detail(f"{site.name} {site.shape}: decomposed in {seconds:.2f} s")
    return found


def decompose_site(opened: Opened, site: Site, statistics: InputStatistics | None) -> dict[str, Tensor]:
    """The method's artefact of one site whose block is loaded, with what allocation needs beside it."""
    method, allocator = opened.request.method, opened.request.allocator
    weight = weight_of(opened, site)
    if method.needs_statistics and (statistics is None or statistics.count == 0):
        raise InputError(f"no calibration token reached {site.name}: use more text, or leave it out with --ignore")
    try:
        if statistics is not None:
            _check_finite(statistics)
        if statistics is not None and statistics.drift is not None:
            share, drift = method.options.toward_dense, statistics.drift / statistics.count
            weight = aimed(weight, statistics.gram(), drift, share, AIM_DAMPING)
        if site.stored is not None:
            assert isinstance(opened.reader, Multiplied)
            left, right = (split(factor, weight.device)[0] for factor in opened.reader.factors(site.name))
            artefact = method.decompose_product(site, left, right, statistics)
        else:
            artefact = method.decompose(site, weight, statistics)
        curve = method.curve_of(site, opened.dtype.itemsize)
        share = _share(method, statistics)
        artefact["errors"] = share * method.errors(artefact, curve)
        artefact["total"] = torch.tensor(share * method.total(artefact), dtype=torch.float64)
        if allocator.needs_spectrum:
            artefact["spectrum"] = singular_values(weight)
        if opened.request.sequential and statistics is not None and statistics.gradients is not None:
            artefact["gradients"] = statistics.gradients.float()
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise NumericalError(f"{site.name}: {error}") from error
    return artefact


def weight_of(opened: Opened, site: Site) -> Tensor:
    """(out, in) of a site that is loaded."""
    weight: Tensor = opened.walker.model.get_submodule(site.name).weight.detach()  # type: ignore[operator,union-attr,assignment]
    return weight.T if site.conv1d else weight


def _share(method: Method, statistics: InputStatistics | None) -> float:
    """What a site's errors count beside those of the block's other sites.

    Those of an expert by its tokens; nothing where the loss has no gradient at the whole block.
    """
    if statistics is None or method.metric == "plain" or statistics.lookups is not None:
        return 1.0
    if method.needs_gradients and not bool((statistics.gradient_squares() > 0).any()):
        return 0.0
    return statistics.share


def _check_finite(statistics: InputStatistics) -> None:
    check_gram(statistics.second, "its outputs" if statistics.of_outputs else "its inputs")
    if statistics.gradients is not None:
        check_gram(statistics.gradients, "its output gradients")
    if statistics.lookups is not None and statistics.lookups.gradients is not None:
        check_gram(statistics.lookups.gradients, "its lookups' gradients")
    if statistics.drift is not None:
        check_gram(statistics.drift, "its inputs and the dense model's")


def double_bytes(site: Site) -> int:
    """Bytes of a weight in float64."""
    return site.shape[0] * site.shape[1] * torch.float64.itemsize


def decomposition_cost(site: Site) -> float:
    """About the multiplications that a weight's decomposition and encoding take."""
    return float(min(site.shape) * max(site.shape) ** 2)


def _tokens(opened: Opened) -> float:
    """How many tokens the statistics of a block count."""
    assert opened.calibration is not None
    share = opened.request.method.options.sink_share
    weights = [(len(sample), token_weights(len(sample), share)) for sample in opened.calibration.samples]
    return sum(float(length if weight is None else weight.sum()) for length, weight in weights)
