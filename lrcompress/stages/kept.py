"""Calibration statistics kept between runs, where a cache folder was named: another method or ratio starts there."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrcompress.calibration.gradients import with_gradients
from lrcompress.checkpoint.cache import LABEL, content_digest, statistics_folder
from lrcompress.checkpoint.writer import write_tensors
from lrcompress.errors import ResourceError
from lrcompress.parallel.processes import processes
from lrcompress.precision import exact, placed, split
from lrcompress.protocols import InputStatistics, Lookups
from lrcompress.report.summary import computing_versions
from lrcompress.stages.opened import Opened
from lrcompress.stages.workspace import write_json

COUNTS, TOTAL, SECOND, GRADIENTS = "|counts", "|total", "|second", "|gradients"
LOOKUPS, LOOKUP_GRADIENTS = "|lookups", "|lookup gradients"


class KeptStatistics:
    """A file per block under the named cache folder; the key is everything that the statistics depend on.

    They are many: a second moment per input and, for metrics with gradients, per output, in float64 whatever the
    device sums in, so that all can read them. So without a folder that the user named nothing is kept.
    """

    def __init__(self, opened: Opened) -> None:
        self._folder: Path | None = None
        self._sites = opened.sites
        self._by_outputs = {site.name for site in opened.sites if site.by_outputs}
        kept = statistics_folder()
        if kept is None:
            return
        self._device, key = opened.walker.device, statistics_key(opened)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._folder = kept / digest
        samples, seqlen = key["tokens"]
        gradients = "" if key["gradients"] is None else ", with gradients"
        self._label = f"{Path(opened.request.recipe.model).name}, {samples} x {seqlen} tokens{gradients}"

    def complete(self) -> bool:
        """Whether every block's statistics are there."""
        blocks = {site.block for site in self._sites}
        return self._folder is not None and all(_is_readable(self._path(self._folder, block)) for block in blocks)

    def load(self, block: int) -> dict[str, InputStatistics]:
        """One block's, in the dtypes that this device has them in."""
        assert self._folder is not None
        with safe_open(self._path(self._folder, block), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
        parts, gradients = {}, {}
        for name, tensor in found.items():
            stem, bar, kind = name.rpartition("|")
            if bar + kind == SECOND:
                (count, rows), (second, rest) = found[stem + COUNTS].tolist(), split(tensor, self._device)
                total, by_outputs = placed(found[stem + TOTAL], self._device), stem in self._by_outputs
                parts[stem] = InputStatistics(count, total, second, rest=rest, rows=int(rows), of_outputs=by_outputs)
                if stem + LOOKUPS in found:
                    parts[stem].gradients = self._loaded(found.get(stem + GRADIENTS))
                    counts, moment = (self._loaded(found.get(stem + key)) for key in (LOOKUPS, LOOKUP_GRADIENTS))
                    assert counts is not None
                    parts[stem].lookups = Lookups(counts, moment)
            elif bar + kind == GRADIENTS and stem + LOOKUPS not in found:
                gradients[stem] = split(tensor, self._device)[0]
        return with_gradients(parts, gradients, self._sites) if gradients else parts

    def _loaded(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else split(tensor, self._device)[0]

    def save(self, block: int, statistics: dict[str, InputStatistics]) -> None:
        """Keep one block's; a folder that cannot be written costs time later, nothing now."""
        if self._folder is None or not processes().first:
            return
        tensors: dict[str, Tensor] = {}
        for site in self._sites:
            found = statistics.get(site.name, statistics.get(site.group)) if site.block == block else None
            if found is not None:  # sites of a group have the same sums of their one input
                counts = found.total.new_tensor([found.count, found.rows])
                sums = {COUNTS: counts, TOTAL: found.total, SECOND: exact(found.second, found.rest)}
                tensors |= {site.group + key: tensor for key, tensor in sums.items()}
                if found.gradients is not None:
                    tensors[site.name + GRADIENTS] = exact(found.gradients)
                if found.lookups is not None:
                    tensors[site.name + LOOKUPS] = exact(found.lookups.counts)
                    if found.lookups.gradients is not None:
                        tensors[site.name + LOOKUP_GRADIENTS] = exact(found.lookups.gradients)
        with contextlib.suppress(OSError, ResourceError):
            if not (self._folder / LABEL).exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                write_json(self._folder / LABEL, {"label": self._label})
            write_tensors(self._path(self._folder, block), tensors)

    @staticmethod
    def _path(folder: Path, block: int) -> Path:
        return folder / f"block-{block:05d}.safetensors"


def _is_readable(path: Path) -> bool:
    """Whether statistics that we have written are there, and whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(name.endswith(SECOND) for name in file.keys())
    except (OSError, SafetensorError):
        return False


def statistics_key(opened: Opened) -> dict[str, Any]:
    """Everything that the dense model's calibration statistics depend on."""
    assert opened.calibration is not None
    method, recipe = opened.request.method, opened.request.recipe
    gradients = None
    if method.needs_gradients:
        drawn = recipe.seed if method.options.labels == "sampled" else None
        gradients = {"gram": method.needs_gradient_gram, "drawn": drawn}
    return {
        "model": content_digest(opened.model.folder),
        "text": opened.calibration.digest(),
        "tokens": [len(opened.calibration.samples), opened.calibration.length],
        "sites": [(site.name, site.group, site.by_outputs, site.of_tokens) for site in opened.sites],
        "sink_share": method.options.sink_share,
        "gradients": gradients,
        "compute": [opened.request.device.type, str(opened.walker.dtype)],
        "versions": computing_versions(),
    }
