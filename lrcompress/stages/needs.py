"""What a compression will need, known before the long work: memory, disk and, roughly, time."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from torch import Tensor

from lrcompress.budget import parse_size
from lrcompress.calibration.gradients import CHUNK
from lrcompress.errors import ResourceError
from lrcompress.linalg.by_row import GROUPS
from lrcompress.parallel.processes import processes
from lrcompress.parallel.side_by_side import is_small, workers_for
from lrcompress.protocols import Site
from lrcompress.report.progress import Reporter, duration
from lrcompress.report.summary import peak_rss_bytes
from lrcompress.stages.decompose import double_bytes
from lrcompress.stages.opened import Opened
from lrcompress.stages.sensitivity import SAMPLES
from lrcompress.stages.time_need import calibration_tokens, longest, seconds_need
from lrcompress.stages.traffic import compared, moment, traffic_need

LOOKED_AT = 4
"""Vectors that a token of a sample with images comes with, at most: one, and those added within a few blocks."""

ROUNDING_UP = 10**7


@dataclass(frozen=True)
class Needs:
    """Of one of nodes × devices processes: memory_bytes, peak of resident memory; seconds, rough; traffic_bytes, of the
    tensors that it gives to sums and to the others. disk_bytes: scratch files and output of all, at most."""

    memory_bytes: int
    disk_bytes: int
    seconds: float
    nodes: int = 1
    devices: int = 1
    traffic_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The `needs` of plan.json and report.json."""
        return asdict(self)

    def __str__(self) -> str:
        size = f"about {self.memory_bytes / 1e6:.0f} MB of memory and up to {self.disk_bytes / 1e6:.0f} MB of disk"
        if self.nodes * self.devices > 1:
            size = (
                f"about {self.memory_bytes / 1e6:.0f} MB of memory in each of {self.nodes * self.devices} processes "
                f"({self.nodes} x {self.devices}), up to {self.disk_bytes / 1e6:.0f} MB of disk, "
                f"{self.traffic_bytes / 1e6:.0f} MB from each over the network"
            )
        return f"{size}, roughly {duration(self.seconds)}"


def needs(opened: Opened, nodes: int = 1, devices: int | None = None) -> Needs:
    """What the opened request will need of one of nodes × devices processes, of those of this run where not given."""
    devices = devices or processes().size
    size = nodes * devices
    return Needs(
        memory_need(opened), disk_need(opened, size), seconds_need(opened, size), nodes, devices,
        traffic_need(opened) if size > 1 else 0,
    )  # fmt: skip


def check_memory(opened: Opened, needed: Needs, reporter: Reporter) -> None:
    """ResourceError where a run would pass the recipe's `memory`; a warning where it would pass what is free."""
    allowed, cure = opened.request.recipe.memory, "use a shorter --seqlen, or leave the widest weights out (--ignore)"
    about = f"compressing needs about {needed.memory_bytes / 1e6:.0f} MB of memory"
    if allowed is not None and needed.memory_bytes > parse_size(allowed):
        raise ResourceError(f"{about}, --memory allows {allowed}: {cure}")
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes().size > 1 else 1
    if allowed is None and here * needed.memory_bytes > free:
        each = "" if here == 1 else f" in each of {here} processes"
        reporter.warn(f"{about}{each}, {free / 1e6:.0f} MB are free: {cure}")


def memory_need(opened: Opened) -> int:
    """Peak resident bytes: so far, or what is resident now and the largest block, its statistics and decompositions.

    Calibration activations are in files, a sample at a time in memory, whatever their number. The source `self`,
    a search for max_loss and refinement load the whole model.
    """
    blocks = range(len(opened.blocks) + 2)
    largest = max(_block_weights(opened, b) + _statistics(opened, b) + _decomposition(opened, b) for b in blocks)
    # Logits, their log-softmax and its input in float32, and the head as a product rearranges it.
    outside = any(site.block >= len(opened.blocks) for site in opened.sites)
    rows = longest(opened) if outside else min(CHUNK, longest(opened))
    logits = 4 * (3 * rows * opened.vocabulary + _embeddings(opened).numel())
    # A tensor that is written as it is: the file's pages, a copy of them and another in the dtype to write.
    copied = 3 * max(meta.numel() * meta.itemsize for meta in map(opened.reader.meta, opened.reader.names()))
    most = max(largest + _activations(opened), logits, copied, _whole_model(opened))
    return max(peak_rss_bytes(), psutil.Process().memory_info().rss + opened.walker.bytes_to_come + most)


def _whole_model(opened: Opened) -> int:
    """Bytes of the largest model that is loaded whole, 0 where none is.

    Refinement trains in float32: the compressed model, and for each of its factors a gradient and two moments.
    """
    recipe, numbers = opened.request.recipe, opened.reader.bytes // opened.reader.dtype.itemsize
    found = 0
    if any(source.name == "self" for source, _, _ in opened.request.sources) or recipe.max_loss is not None:
        found = numbers * opened.walker.dtype.itemsize + opened.reader.bytes  # pages of the files are resident too
    if recipe.refine is not None:
        targets = sum(s.shape[0] * s.shape[1] for s in opened.sites)
        found = max(found, 4 * (numbers + 3 * targets) + opened.reader.bytes)
    return found


def disk_need(opened: Opened, size: int = 1) -> int:
    """Bytes of scratch files and output together, an upper bound."""
    method = opened.request.method
    factors = sum(4 * _kept_numbers(opened, site) for site in opened.sites)
    if opened.request.sequential:  # a second set of decompositions, and the gradients that they need
        factors += factors + sum(4 * compared(opened, s) ** 2 for s in opened.sites)
    if method.base is not None:
        factors += sum(4 * s.shape[0] * s.shape[1] for s in opened.sites)
    if method.keeps_gram:
        factors += sum(4 * s.shape[1] ** 2 for s in opened.sites)
    shares = method.group > 1 or any(method.joins(site) for site in opened.sites)
    output = opened.dense_checkpoint_bytes * (2 if shares else 1)
    if opened.request.recipe.max_loss is not None:  # a candidate
        output += opened.dense_checkpoint_bytes
    widths = max((s.shape[1] for s in opened.sites), default=0)
    # A backward pass keeps the hidden states of every block until it has been there.
    files = len(opened.blocks) + 4 if method.needs_gradients else 4
    hidden = files * calibration_tokens(opened) * widths * opened.walker.dtype.itemsize
    encoded = opened.dense_checkpoint_bytes if size > 1 else 0  # weights, for the other processes
    return factors + output + hidden + encoded + _cuts(opened) + _looks(opened) + ROUNDING_UP


def _kept_numbers(opened: Opened, site: Site) -> int:
    """Of an artefact: both factors, or a weight that is still to be rounded and the factors of both its Grams."""
    (m, n), rounds = site.shape, opened.request.method.rounds
    if rounds:
        return m * n + n * n * GROUPS if site.of_tokens else m * n + m * m + n * n
    return min(m, n) * (m + n)


def _cuts(opened: Opened) -> int:
    """Bytes of the hidden states that sensitivities are measured on: the dense ones, and those of every cut weight."""
    if not opened.request.allocator.needs_sensitivity or opened.request.recipe.rank is not None:
        return 0
    inside = sum(site.block < len(opened.blocks) for site in opened.sites)
    width = _embeddings(opened).shape[1]
    return SAMPLES * (1 + inside) * longest(opened) * width * opened.walker.dtype.itemsize


def _looks(opened: Opened) -> int:
    """Bytes of what images are to the language model: every token's embedding, features for a few blocks, masks."""
    found = [] if opened.calibration is None else [*opened.calibration.samples, *opened.calibration.unseen]
    lengths = [len(sample) for sample in found if sample.look is not None]
    width, size = _embeddings(opened).shape[1], opened.walker.dtype.itemsize
    return sum(length * (LOOKED_AT * width + 2 * length) * size for length in lengths)


def _embeddings(opened: Opened) -> Tensor:
    weight: Tensor = opened.skeleton.get_input_embeddings().weight  # type: ignore[operator]
    return weight


def _block_weights(opened: Opened, block: int) -> int:
    """Bytes of a block's weights to compute with, and as they are stored: their pages are resident while read."""
    if block >= len(opened.blocks):
        return 0
    metas = [opened.reader.meta(key) for key in opened.walker.names_in(block).values()]
    return sum(meta.numel() * (opened.walker.dtype.itemsize + meta.itemsize) for meta in metas)


def _statistics(opened: Opened, block: int) -> int:
    """Bytes of the moments that are gathered at once in a block."""
    method, sites = opened.request.method, opened.sites_of(block)
    inputs = sum(8 * moment(s) for s in sites if s.group == s.name) if method.needs_statistics else 0
    outputs = sum(8 * max(compared(opened, s) ** 2, s.shape[0]) for s in sites)
    return inputs + (outputs if method.needs_gradients else 0)


def _decomposition(opened: Opened, block: int) -> int:
    """Bytes of a block's decompositions, in float32, and of the work space, in float64, of those that run at once."""
    method, sites = opened.request.method, opened.sites_of(block)
    kept = sum(4 * _kept_numbers(opened, site) for site in sites)
    kept += sum(4 * s.shape[1] ** 2 for s in sites if method.keeps_gram)

    def work(site: Site) -> int:
        (m, n), k = site.shape, min(site.shape)
        numbers = 2 * moment(site) + 4 * k * k + 4 * m * n
        numbers += 7 * compared(opened, site) ** 2
        numbers += 4 * n * n if method.base is not None else 0
        return 8 * numbers

    workers = workers_for([double_bytes(site) for site in sites], opened.request.device)
    by_size = sorted((work(site) for site in sites), reverse=True)
    small = sorted((work(site) for site in sites if is_small(double_bytes(site))), reverse=True)
    return kept + max(sum(by_size[:1]), sum(small[:workers]))


def _activations(opened: Opened) -> int:
    """Bytes of what one sample leaves in a block; with gradients, everything is kept for the way back."""
    widths = sum(sum(site.shape) for site in opened.sites_of(0))
    return longest(opened) * widths * opened.walker.dtype.itemsize * (3 if opened.request.method.needs_gradients else 1)
