"""One weight's decomposition, with what allocation needs beside it."""

import torch
from torch import Tensor

from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.errors import InputError, NumericalError
from lrcompress.linalg.truncation import singular_values
from lrcompress.linalg.whitening import aimed, check_gram
from lrcompress.methods import Method
from lrcompress.model.device import decomposition_device
from lrcompress.protocols import InputStatistics, Site
from lrcompress.stages.opened import Opened

AIM_DAMPING = 0.01
"""Of the Gram that a weight's aim at the dense model is solved with, relative to its mean eigenvalue."""


def decompose_site(opened: Opened, site: Site, statistics: InputStatistics | None) -> dict[str, Tensor]:
    """The method's artefact of one site whose block is loaded, with what allocation needs beside it."""
    method, allocator = opened.request.method, opened.request.allocator
    weight = weight_of(opened, site).to(decomposition_device(opened.walker.device))
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
            left, right = (factor.to(weight.device) for factor in opened.reader.factors(site.name))
            artefact = method.decompose_product(site, left, right, statistics)
        else:
            artefact = method.decompose(site, weight, statistics)
        curve = method.curve(site, opened.dtype.itemsize)
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
