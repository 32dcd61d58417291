"""What the matrix of input embeddings is rounded by: statistics of its lookups, and of the head that is tied to it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from lrcompress.calibration.gradients import lookup_gradients
from lrcompress.calibration.hidden import HiddenStates
from lrcompress.checkpoint.writer import write_tensors
from lrcompress.model.lookups import row_scale
from lrcompress.model.samples import Sample
from lrcompress.precision import exact, placed, split, wide
from lrcompress.protocols import InputStatistics, Lookups, Site
from lrcompress.stages.opened import Opened

COUNTS, TOTAL, SECOND, GRADIENTS = "counts", "total", "second", "gradients"


def heads_of(embeddings: Sequence[Site]) -> list[Site]:
    """The output heads that are tied to input embeddings, as sites of their own."""
    return [
        replace(site, name=site.head, group=site.head, lookup=False) for site in embeddings if site.head is not None
    ]


def keep_heads(folder: Path, statistics: dict[str, InputStatistics], heads: Sequence[Site]) -> None:
    """Write what the loss says of `heads` into a process's scratch `folder`, for `embedding_statistics`."""
    for head in heads:
        found = statistics[head.name]
        assert found.gradients is not None
        counts = found.total.new_tensor([found.count, found.rows])
        second = exact(found.second, found.rest)
        tensors = {COUNTS: counts, TOTAL: found.total, SECOND: second, GRADIENTS: found.gradients}
        write_tensors(_path(folder, head), {key: tensor.cpu() for key, tensor in tensors.items()})


def kept_heads(folder: Path, heads: Sequence[Site], device: torch.device) -> dict[str, InputStatistics]:
    """What `keep_heads` has written."""
    found = {}
    for head in heads:
        with safe_open(_path(folder, head), framework="pt") as file:
            counts, total, second, gradients = (file.get_tensor(key) for key in (COUNTS, TOTAL, SECOND, GRADIENTS))
        (count, rows), (second, rest) = counts.tolist(), split(second, device)
        total, gradients = placed(total, device), gradients.to(device)
        found[head.name] = InputStatistics(count, total, second, gradients, rest, rows=int(rows))
    return found


def _path(folder: Path, head: Site) -> Path:
    return folder / f"{head.name}.safetensors"


def embedding_statistics(
    opened: Opened, heads: dict[str, InputStatistics], samples: Sequence[Sample], entering: HiddenStates | None
) -> dict[str, InputStatistics]:
    """Of every embedding site: its lookups, beside the statistics of its head among `heads` by name.

    entering: the loss's gradients at the hidden states that enter the first block, of this process's `samples`, for
    methods that need them.
    """
    assert opened.calibration is not None
    found, device = {}, opened.walker.device
    every = torch.cat([sample.written for sample in opened.calibration.samples])
    for site in opened.embeddings:
        if entering is None:
            lookups = Lookups(torch.bincount(every, minlength=site.shape[0]).to(wide(device)).to(device))
        else:
            lookups = _lookups(opened, site, samples, entering)
        if site.head is None:
            statistics = InputStatistics.zeros(site.shape[1], device)
            statistics.count, statistics.rows = float(every.numel()), every.numel()
        else:
            statistics = heads[site.head]
        found[site.name] = replace(statistics, lookups=lookups)
    return found


def _lookups(opened: Opened, site: Site, samples: Sequence[Sample], entering: HiddenStates) -> Lookups:
    module = opened.walker.model.get_submodule(site.name)
    assert isinstance(module, torch.nn.Embedding)
    gradients, counts = lookup_gradients(opened.walker, samples, entering, module)
    return Lookups(counts, row_scale(module) ** 2 * gradients)
