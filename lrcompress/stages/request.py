"""What a recipe asks for, looked up before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lrcompress.allocators import ALLOCATORS
from lrcompress.calibration.corpus import Source, parse_source, shares
from lrcompress.calibration.drawing import MOST_HELD_OUT, windows_for
from lrcompress.errors import InputError
from lrcompress.foreign.existing import check_existing
from lrcompress.foreign.opening import check_model
from lrcompress.ggml.file_types import check_file_type
from lrcompress.methods import Method, make_method
from lrcompress.methods.ggml import GgmlBlocks
from lrcompress.model.device import statistics_device
from lrcompress.protocols import Allocator
from lrcompress.recipe import CalibrationSpec, Recipe


@dataclass(frozen=True)
class Request:
    """A recipe whose names all mean something; nothing has been loaded."""

    recipe: Recipe
    method: Method
    allocator: Allocator
    sources: list[tuple[Source, int, int]]
    device: torch.device
    searched: float | None = None
    """The ratio that a search for `max_loss` tries, or has chosen."""

    @property
    def ratio(self) -> float | None:
        """The ratio to reach, None where a size or a rank was asked for."""
        return self.searched if self.recipe.ratio is None else self.recipe.ratio

    @property
    def drawn(self) -> list[tuple[Source, int, int]]:
        """The sources as they are drawn from: of a method that needs no statistics held-out windows alone."""
        wanted = self.method.needs_statistics
        return [(source, samples if wanted else 0, seqlen) for source, samples, seqlen in self.sources]

    @property
    def windows(self) -> int | None:
        """Held-out windows of a source; None where its samples say how many, see `windows_for`."""
        if self.recipe.refine is not None:
            return MOST_HELD_OUT  # training is judged by them too
        if self.method.needs_statistics:
            return None
        return max(windows_for(samples) for _, samples, _ in self.sources)

    @property
    def sequential(self) -> bool:
        """Whether blocks are decomposed on what the compressed ones before them give."""
        return self.method.options.propagation == "sequential" and self.method.needs_statistics

    @property
    def amount_by(self) -> str:
        """What decides on a weight's level: the allocator, or the one rank or file type that was asked for."""
        if self.recipe.type is not None:
            return "type"
        return self.allocator.name if self.recipe.rank is None else "rank"


def check_request(recipe: Recipe) -> Request:
    """Look every name of the recipe up before anything is loaded or written."""
    method = make_method(recipe.method.name, recipe.method.options, recipe.format, recipe.base)
    if recipe.rank is not None and not method.takes_rank:
        raise InputError(f"method {method.name} takes no --rank {recipe.rank}: ask for a --ratio")
    blocks = isinstance(method, GgmlBlocks)
    if recipe.type is not None and not blocks:
        raise InputError(f"--type {recipe.type} is for method ggml: leave --method {method.name} out")
    if blocks and recipe.type is None and recipe.bpw is None and recipe.size is None:
        raise InputError("method ggml stores llama.cpp's block types: ask for a --type Q4_K_M, a --bpw or a --size")
    if recipe.type is not None:
        recipe = recipe.model_copy(update={"type": check_file_type(recipe.type)})
    if recipe.ratio_of == "rank" and not method.levels_are_ranks:
        raise InputError(
            f"method {method.name} has no ranks of the weights themselves for ratio_of=rank to count: "
            "ask for ratio_of=bytes or flops" + (", or --format low_rank" if "low_rank" in method.formats else "")
        )
    if (recipe.rank is not None or recipe.type is not None) and recipe.allocator is not None:
        asked = f"--type {recipe.type}" if recipe.type is not None else f"--rank {recipe.rank}"
        raise InputError(f"{asked} leaves allocator {recipe.allocator} nothing to decide: leave one out")
    allocator = ALLOCATORS.get(recipe.allocator or method.default_allocator)()
    if method.options.toward_dense and method.options.propagation != "sequential":
        raise InputError(
            f"toward_dense={method.options.toward_dense:g} aims from compressed inputs: add propagation=sequential"
        )
    if method.options.toward_dense and not method.needs_statistics:
        raise InputError(
            f"toward_dense={method.options.toward_dense:g} aims at the dense model's outputs on text, of which metric "
            f"{method.metric} reads none: use metric=input, or leave toward_dense out"
        )
    if allocator.needs_sensitivity and not method.needs_statistics:
        raise InputError(
            f"allocator {allocator.name} measures on calibration text, of which metric {method.metric} reads none: "
            "use metric=input or another allocator"
        )
    if method.options.labels != "text" and not method.needs_gradients:
        raise InputError(
            f"labels={method.options.labels} are those of gradients, which metric {method.metric} does without: "
            "use metric=two_sided or trace, or leave labels out"
        )
    if method.existing_base is not None:
        check_existing(method.existing_base.folder)
    if method.options.propagation == "sequential" and (method.group > 1 or _may_join(method)):
        raise InputError(
            "propagation=sequential stores block by block, group and join share among blocks: leave one out"
        )
    check_model(recipe.model)
    sources = split_samples(recipe.calibration)
    return Request(recipe, method, allocator, sources, statistics_device(recipe.device))


def _may_join(method: Method) -> bool:
    return getattr(method.options, "join", "none") != "none"


def split_samples(specs: Sequence[CalibrationSpec]) -> list[tuple[Source, int, int]]:
    """(source, samples, seqlen) each; their files are checked."""
    return [(parse_source(spec.source), spec.samples, spec.seqlen) for spec in specs]


def share_samples(sources: Sequence[str], samples: int, seqlen: int) -> list[CalibrationSpec]:
    """Calibration of several SPECs on a command line: `samples` in all, shared by their weights."""
    counts = shares([parse_source(source).weight for source in sources], samples)
    return [CalibrationSpec(source=s, samples=n, seqlen=seqlen) for s, n in zip(sources, counts, strict=True) if n]
