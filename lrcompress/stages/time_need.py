"""How long a compression will take here, roughly: the operations of its steps over the rates of products.

Constants are those of blocks of hidden 1024 and 2048, whose steps were timed (docs/speed.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lrcompress.calibration.drawing import MOST_HELD_OUT, windows_for
from lrcompress.checkpoint.folder import read_sound_config
from lrcompress.foreign.opening import open_model
from lrcompress.formats.pivoted import Pivoted
from lrcompress.model.device import resolve_device
from lrcompress.model.skeleton import empty_model
from lrcompress.parallel.processes import Processes
from lrcompress.precision import rate, wide
from lrcompress.protocols import Site
from lrcompress.stages.allocate import needs_profile
from lrcompress.stages.decompose import decomposition_cost
from lrcompress.stages.opened import Opened
from lrcompress.stages.phases import BACKWARD, CALIBRATE, ENCODE, FORWARD, PROPAGATE, REFINE, SEARCH, WRITE
from lrcompress.stages.search import WINDOWS
from lrcompress.stages.traffic import compared, moment

EIGENPROBLEM = 6.0
"""Multiply-adds of a symmetric eigenproblem with vectors, at the rate of a product, over the cube of its size."""

VALUES = 3.0
"""Of one without vectors."""

PROJECTION = 2.0
"""Products as large as the weight times its smaller side, in decomposing it."""

TRIANGLE = 0.5
"""Of a second moment one triangle is summed."""

ROUNDING_ROWS = 2.0
"""Multiply-adds of a rounding with feedback to both sides, for every entry and each of its row and column."""

ATTENTION = 4.0
"""Of attention's two products, which see half of the sample on average: what lies between them takes longer."""

PER_WEIGHT = 0.04
"""Seconds of a weight beside its operations, in decomposing it and again in encoding it."""

CODING_ROUNDS = 40.0
"""Products of codes and dictionary, and of their Gram, that learning a sparse dictionary takes."""

CANDIDATES = 4
"""Checkpoints that a search for a loss writes and measures, the result among them."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds, by the precision that they are done in; float64 stands for the device's wide dtype."""

    float32: float = 0.0
    float64: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.float32 + other.float32, self.float64 + other.float64)

    def __mul__(self, times: float) -> "Work":
        return Work(self.float32 * times, self.float64 * times)

    def seconds(self, device: torch.device) -> float:
        """At the rates of products here."""
        return self.float32 / rate(torch.float32, device) + self.float64 / rate(wide(device), device)


def seconds_need(opened: Opened, size: int = 1) -> float:
    """Rough. Nothing that waits for a disk or a network is counted, nor what other programs take.

    Of `size` processes on as many devices it is that of the one with most to do: of the samples, and of the weights of
    every block.
    """
    return sum(phase_seconds(opened, size).values())


def phase_seconds(opened: Opened, size: int = 1) -> dict[str, float]:
    """`seconds_need` by the phases of stages/phases.py, in their order."""
    recipe, method, sequential = opened.request.recipe, opened.request.method, opened.request.sequential
    share, device = _largest_share(opened, size), opened.walker.device
    tokens = share * sum(samples * seqlen for _, samples, seqlen in opened.request.sources)
    held_out = sum(windows_for(samples) * seqlen for _, samples, seqlen in opened.request.sources)
    forward, moments = _forward(opened), _moments(opened) * tokens
    decomposing = _of_all(opened, size, lambda site: _decomposing(opened, site))
    encoding = _of_all(opened, size, lambda site: _encoding(opened, site))
    apart = PER_WEIGHT * _of_all(opened, size, lambda _: Work(float32=1.0)).float32
    found: dict[str, float] = {}
    if method.needs_gradients:
        found[FORWARD] = (forward * (tokens + held_out)).seconds(device)
        # The way back computes a block anew.
        found[BACKWARD] = (forward * (2 * tokens) + moments + decomposing).seconds(device) + apart
    elif needs_profile(opened):
        found[CALIBRATE] = (forward * (tokens + held_out) + moments + decomposing).seconds(device) + apart
    written: dict[str, float] = {}
    if sequential:
        written[PROPAGATE] = (forward * (2 * tokens) + moments + decomposing).seconds(device) + apart
    first = ENCODE if method.sizes_are_estimates and not sequential else WRITE
    written[first] = encoding.seconds(device) + apart
    written[WRITE] = written.get(WRITE, 0.0) + (forward * held_out).seconds(device)
    if recipe.max_loss is not None:
        most = WINDOWS * sum(seqlen for _, _, seqlen in opened.request.sources)
        measured = (forward * most).seconds(device)
        found[SEARCH] = (CANDIDATES - 1) * sum(written.values()) + CANDIDATES * measured
    if recipe.refine is not None:
        written[REFINE] = 60 * recipe.refine
    return found | written


def reading_seconds(model: str, tokens: int, device: str, *, trust_remote_code: bool) -> float:
    """Rough, of a MODEL to read so many tokens once: a multiply-add for each of its parameters."""
    where = resolve_device(device)
    config = read_sound_config(open_model(model).folder, trust_remote_code=trust_remote_code)
    network = empty_model(config, trust_remote_code=trust_remote_code)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    return Work(float32=float(numbers * tokens)).seconds(where)


def calibration_tokens(opened: Opened) -> int:
    """Of calibration and held-out text, at most."""
    return sum((samples + MOST_HELD_OUT) * seqlen for _, samples, seqlen in opened.request.sources)


def longest(opened: Opened) -> int:
    """Tokens of the longest sample."""
    return max(seqlen for _, _, seqlen in opened.request.sources)


def _forward(opened: Opened) -> Work:
    """Of a token through all blocks, half of its sample before it."""
    width: int = opened.skeleton.get_input_embeddings().weight.shape[1]  # type: ignore[operator,union-attr,assignment]
    attention = ATTENTION * longest(opened) * width * len(opened.blocks)
    return Work(float32=sum(s.shape[0] * s.shape[1] for s in opened.sites) + attention)


def _moments(opened: Opened) -> Work:
    """Of what is summed a token."""
    method = opened.request.method
    inputs = sum(moment(s) for s in opened.sites if s.group == s.name and method.needs_statistics)
    return Work(float32=TRIANGLE * (inputs + sum(compared(opened, s) ** 2 for s in opened.sites)))


def _of_all(opened: Opened, size: int, work: Callable[[Site], Work]) -> Work:
    """Of all blocks, in the process that has most of each, where `size` share the sites by their cost."""
    device, found = opened.walker.device, Work()
    for block in range(len(opened.blocks) + 2):
        sites = opened.sites_of(block)
        costs = [decomposition_cost(site) for site in sites]
        shares = [
            sum((work(sites[place]) for place in Processes(rank, size).own(costs)), Work()) for rank in range(size)
        ]
        found += max(shares, key=lambda share: share.seconds(device))
    return found


def _decomposing(opened: Opened, site: Site) -> Work:
    """Of a site's factors, and of its base where there is one."""
    method, (m, n), k = opened.request.method, site.shape, min(site.shape)
    if method.rounds:  # Cholesky factors of both Grams and their inverses, with what is a triangle of them
        levels = len(method.curve_of(site, opened.dtype.itemsize).ranks) - 1
        searched = (1 if opened.request.recipe.type is not None else levels) * method.search_work(site)
        return Work(float32=compared(opened, site) ** 3 + n**3 + searched)
    work = EIGENPROBLEM * (k**3 + compared(opened, site) ** 3) + PROJECTION * m * n * k
    if opened.request.allocator.needs_spectrum:
        work += VALUES * k**3 + m * n * k
    if method.base is not None and method.keeps_gram:
        work += n**3 / 3 + m * n * n / 2
    return Work(float64=work)


def _encoding(opened: Opened, site: Site) -> Work:
    """Of what is stored of a site."""
    method, (m, n), k = opened.request.method, site.shape, min(site.shape)
    if method.search_work(site):
        return Work()
    if method.rounds:
        return Work(float32=ROUNDING_ROWS * m * n * sum(site.shape[site.of_tokens :]))
    if not method.errors_are_exact:
        return Work(float32=CODING_ROUNDS * m * k * (n + 2 * k))
    return Work(float64=float(m * n * k)) if Pivoted.name in method.formats else Work()


def _largest_share(opened: Opened, size: int) -> float:
    """The part of all samples that the first process has."""
    samples = sum(samples for _, samples, _ in opened.request.sources)
    return len(Processes(0, size).samples(samples)) / samples if samples else 1.0
