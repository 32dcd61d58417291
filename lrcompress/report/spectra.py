"""Singular values of the dense weights, with the cut that a compression made through them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lrcompress.checkpoint.experts import open_skeleton
from lrcompress.errors import InputError
from lrcompress.foreign.opening import open_dense
from lrcompress.model.device import double_device, resolve_device
from lrcompress.model.skeleton import checkpoint_names
from lrcompress.model.targets import is_conv1d, is_linear
from lrcompress.protocols import Site
from lrcompress.report.finished import Target
from lrcompress.report.inspection import stored_weight

POINTS = 64


@dataclass(frozen=True)
class Spectrum:
    """points: (number from 1, singular value) of at most 64 of them, falling; cut: the last kept one, if any is cut."""

    points: list[tuple[int, float]]
    cut: tuple[int, float] | None


def dense_spectra(
    model: str,
    targets: Sequence[Target],
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Spectrum]:
    """By the target's name, from the weights of the dense `model`, one in memory at a time.

    InputError where the model lacks one of the targets or has it in another shape.
    """
    opened = open_dense(model)
    where = double_device(resolve_device(device))
    skeleton, reader = open_skeleton(opened.folder, trust_remote_code=trust_remote_code)
    sites = [_site(model, skeleton, target) for target in targets]
    names = checkpoint_names(skeleton, reader.names())
    found = {}
    for target, site in zip(targets, sites, strict=True):
        weight = stored_weight(site, None, reader, names).to(where, torch.float64)
        found[target.name] = thinned(torch.linalg.svdvals(weight).tolist(), target.rank)
        tick()
    return found


def thinned(values: Sequence[float], rank: int) -> Spectrum:
    """Evenly spaced points of a whole spectrum, first and last included; a rank of 0 or all cuts nothing."""
    count = min(POINTS, len(values))
    index = torch.linspace(0, len(values) - 1, count).round().long().tolist()
    cut = (rank, values[rank - 1]) if 0 < rank < len(values) else None
    return Spectrum([(i + 1, values[i]) for i in index], cut)


def _site(model: str, skeleton: nn.Module, target: Target) -> Site:
    try:
        module = skeleton.get_submodule(target.name)
    except AttributeError as error:
        raise InputError(f"--against {model} has no weight {target.name}: it is another model") from error
    if not is_linear(module):
        raise InputError(f"--against {model}: {target.name} is no linear layer there: it is another model")
    conv1d = is_conv1d(module)
    shape = tuple(module.weight.shape)[:: -1 if conv1d else 1]  # type: ignore[arg-type,misc]
    if shape != target.shape:
        raise InputError(
            f"--against {model}: {target.name} is {shape} there, {target.shape} in the checkpoint: it is another model"
        )
    return Site(target.name, target.shape, 0, target.name, module.bias is not None, conv1d)
