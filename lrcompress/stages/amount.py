"""How many bytes the targets may have, by ratio, size or bits a weight."""

import math
from collections.abc import Sequence
from fractions import Fraction

from lrcompress.allocators.base import check_possible, largest_ratio
from lrcompress.budget import bits_per_weight, kept_bytes, parse_size
from lrcompress.errors import InputError
from lrcompress.formats import stored_tensors
from lrcompress.methods.ggml import GgmlBlocks
from lrcompress.protocols import Curve
from lrcompress.report.progress import Reporter
from lrcompress.stages.costs import Costs
from lrcompress.stages.opened import Opened

FILE_HEADER = 64
"""Bytes of the header of a file beside its tensors' entries, at most."""


def budget_of(opened: Opened, choices: Sequence[Costs]) -> int:
    """What the targets may cost; InputError, before anything is decomposed, where no choice is so small.

    With a size, that is what everything else leaves of it.
    """
    request, curves = opened.request, [choice.asked for choice in choices]
    if request.recipe.size is not None and isinstance(request.method, GgmlBlocks):
        return _budget_of_file(request.method, request.recipe.size, choices)
    if request.recipe.size is not None:
        return _budget_of_size(opened, request.recipe.size, sum(int(c.bytes[0]) for c in curves))
    if request.recipe.bpw is not None:
        return _budget_of_bits(opened, request.recipe.bpw, curves)
    assert request.ratio is not None
    budget = kept_bytes((curve.dense_bytes for curve in curves), request.ratio)
    least, dense = sum(int(c.bytes[0]) for c in curves), sum(c.dense_bytes for c in curves)
    if least > budget and request.method.base is not None and request.recipe.ratio_of == "bytes":
        largest = largest_ratio(least, dense)
        raise InputError(
            f"--ratio {request.ratio:g} is more than base {request.method.base} alone removes: ask for a ratio "
            f"of at most {largest:.4f}, which leaves no correction, or for a smaller base"
        )
    if least == dense and request.recipe.ratio_of != "bytes":
        raise InputError(
            f"method {request.method.name} has no choice here with fewer {request.recipe.ratio_of} than the dense "
            "weights: ask for another ratio_of, method or base"
        )
    check_possible(curves, budget, request.recipe.ratio_of)
    kept = sum(int(curve.bytes[-1]) for curve in curves)
    if kept <= budget:
        raise InputError(
            f"--ratio {request.ratio:g}: model {request.recipe.model} has {1 - kept / dense:.4f} of its dense weights' "
            "bytes removed already, ask for more"
        )
    return budget


def _budget_of_file(method: GgmlBlocks, text: str, choices: Sequence[Costs]) -> int:
    """What fits no block has 16 bits a number in the file, whatever it has in a checkpoint."""
    size = parse_size(text) - method.beside
    kept = [choice for choice in choices if len(choice.asked.bytes) == 1]
    more = sum(int(choice.asked.bytes[0]) - sum(2 * s.shape[0] * s.shape[1] for s in choice.sites) for choice in kept)
    least = sum(int(choice.asked.bytes[0]) for choice in choices) - more
    if least > size:
        raise InputError(
            f"size {text} cannot be reached: everything but the targets has {method.beside} bytes in the file, the "
            f"smallest types of the targets {least}: ask for at least {method.beside + least} bytes"
        )
    return size + more


def _budget_of_bits(opened: Opened, bits: float, curves: Sequence[Curve]) -> int:
    numbers = sum(site.shape[0] * site.shape[1] for site in opened.sites)
    budget = int(Fraction(repr(bits)) * numbers / 8)
    least, most = sum(int(c.bytes[0]) for c in curves), sum(int(c.bytes[-1]) for c in curves)
    if not least <= budget < most:
        raise InputError(
            f"--bpw {bits:g} cannot be reached: method {opened.request.method.name} stores these weights in "
            f"{math.ceil(800 * least / numbers) / 100:.2f} to less than {8 * most / numbers:.2f} bits each"
        )
    return budget


def _budget_of_size(opened: Opened, text: str, least: int) -> int:
    size, other = parse_size(text), other_bytes(opened)
    dense = opened.dense_checkpoint_bytes
    if size >= dense:
        raise InputError(
            f"size {text}: the dense checkpoint has {dense} bytes, it is that small already: ask for a smaller size"
        )
    if other + least > size:
        raise InputError(
            f"size {text} cannot be reached: everything but the targets has {other} bytes, the smallest choice for the "
            f"targets {least}: ask for at least {other + least} bytes ({(other + least) / 1e6:.2f} MB)"
        )
    return size - other


def other_bytes(opened: Opened) -> int:
    """Bytes of all that is written beside the targets' weights, at most: a bias may get the dtype of the factors.

    The headers of the files are among them.
    """
    weights = {f"{name}.weight" for site in opened.sites for name in (site.name, site.head)}
    biases = {site.name + ".bias" for site in opened.sites}
    total = header_bytes(opened)
    added = {site.name + ".bias" for site in opened.sites if not site.bias}
    for name, key in opened.walker.names.items():
        if name in weights or name in added:  # an added bias is counted with its weight
            continue
        tensor = opened.reader.meta(key)
        size = opened.written_dtype(tensor).itemsize
        if name in biases:
            size = max(size, opened.dtype.itemsize)
        total += tensor.numel() * size
    return total


def header_bytes(opened: Opened) -> int:
    """Bytes of the names, shapes and places of all tensors in the files, at most."""
    method, size = opened.request.method, opened.dtype.itemsize
    sites, most = {site.name for site in opened.sites}, len(str(opened.dense_checkpoint_bytes))

    def entry(name: str, shape: Sequence[int]) -> int:
        """Of a tensor: name, dtype of at most four letters, shape and two places."""
        return len(f'"{name}":{{"dtype":"BF16","shape":{list(shape)},"data_offsets":[,]}},') + 2 * most

    total = FILE_HEADER
    for name, key in opened.walker.names.items():
        if name.rpartition(".")[0] not in sites:
            total += entry(name, opened.reader.meta(key).shape)
    for site in opened.sites:
        ranks = method.curve_of(site, size).ranks.tolist()
        specs = [method.spec(site, rank, size) for rank in (ranks[0], ranks[-2])] if len(ranks) > 1 else []
        stored = [stored_tensors(spec, opened.dtype) for spec in specs]
        total += max((sum(entry(f"{site.name}.{k}", t.shape) for k, t in one.items()) for one in stored), default=0)
    return total


FEW_BITS, SOME_BITS = 1.0, 2.0
"""Bits for each weight, fewer than a sign takes, below which little of a model can be left; and what to try instead."""


def check_amount(opened: Opened, reporter: Reporter) -> None:
    """Refuse a ratio or a size that cannot be reached, before any text is read; a warning where it is hopeless."""
    recipe = opened.request.recipe
    blocks = isinstance(opened.request.method, GgmlBlocks)  # whose types are still to be found
    if recipe.rank is None and recipe.max_loss is None and not blocks:
        budget, numbers = budget_of(opened, opened.costs()), sum(s.shape[0] * s.shape[1] for s in opened.sites)
        bits = bits_per_weight(budget, numbers)
        if recipe.ratio_of == "bytes" and bits < FEW_BITS:
            reporter.warn(
                f"this leaves {bits:.2f} bits for each of the {numbers / 1e6:.4g} million weights, of which each sign "
                f"alone takes one: hardly anything of the model will be left. {SOME_BITS:g} bits (--bpw "
                f"{SOME_BITS:g}) are {numbers * SOME_BITS / 8e6:.3g} MB"
            )
