"""Opening the model, finding its targets, reading its calibration text."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import nn

from lrcompress.allocators import ALLOCATORS
from lrcompress.allocators.base import check_possible, largest_ratio
from lrcompress.budget import FEW_TARGETS, kept_bytes, parse_size
from lrcompress.calibration.corpus import (
    MOST_HELD_OUT,
    Calibration,
    Source,
    calibration_blocks,
    parse_source,
    shares,
)
from lrcompress.checkpoint.existing import Dense, check_existing, open_existing
from lrcompress.checkpoint.experts import ExpertReader
from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.checkpoint.opening import (
    OpenedModel,
    check_model,
    is_gguf,
    open_model,
    read_sound_config,
    refuse_compressed,
)
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.shards import remark
from lrcompress.errors import InputError
from lrcompress.formats import stored_tensors
from lrcompress.ggml.file_types import check_file_type
from lrcompress.methods import Method, make_method
from lrcompress.methods.ggml import GgmlBlocks
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.device import compute_dtype, resolve_device, resolve_dtype
from lrcompress.model.experts import LinearExperts, experts_of, linear_experts, linearise
from lrcompress.model.limits import check_tokens, known_tokens, length_warning
from lrcompress.model.skeleton import empty_model, find_blocks, library_errors
from lrcompress.model.targets import find_sites, group_sites, is_linear, names_matching, refuse_tied
from lrcompress.processes import processes
from lrcompress.protocols import Allocator, Curve, Site
from lrcompress.recipe import CalibrationSpec, Recipe
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import block_and_kind
from lrcompress.stages.costs import Costs, costs

FILE_HEADER = 64
"""Bytes of the header of a file beside its tensors' entries, at most."""


NOTEWORTHY = 0.1
"""Share of a model's parameters of a part that stays dense which is worth a word."""

ADAPTER = "adapter_config.json"
IGNORED = "_keys_to_ignore_on_load_unexpected"
"""Where transformers' models keep patterns of tensors that belong to no parameter of theirs."""


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
    def sequential(self) -> bool:
        """Whether blocks are decomposed on what the compressed ones before them give."""
        return self.method.options.propagation == "sequential" and self.method.needs_statistics

    @property
    def amount_by(self) -> str:
        """What decides on a weight's level: the allocator, or the one rank or file type that was asked for."""
        if self.recipe.type is not None:
            return "type"
        return self.allocator.name if self.recipe.rank is None else "rank"


@dataclass
class Opened:
    """A dense model ready to be walked. `dtype` is the one to write in."""

    request: Request
    model: OpenedModel
    reader: CheckpointReader
    skeleton: nn.Module
    walker: BlockWalker
    sites: list[Site]
    dtype: torch.dtype
    calibration: Calibration | None
    experts: dict[str, LinearExperts] = field(default_factory=dict)
    """The modules that hold experts, which the dense model has fused."""

    @property
    def blocks(self) -> list[str]:
        """Module names of the decoder blocks."""
        return self.walker.blocks

    @property
    def towers(self) -> dict[str, int]:
        """Parameters of every part with layers that lies beside the language model's blocks and has no target."""
        own = [site.name for site in self.sites]
        found = towers(self.skeleton, self.blocks)
        return {n: size for n, size in found.items() if not any(f"{site}.".startswith(f"{n}.") for site in own)}

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return known_tokens(self.skeleton)

    @property
    def dense_checkpoint_bytes(self) -> int:
        """Bytes of the whole dense checkpoint at the dtype to write."""
        added = {f"{site.name}.bias" for site in self.sites if site.stored is not None and site.stored.added_bias}
        known = set(self.walker.names.values())
        metas = [self.reader.meta(name) for name in self.reader.names() if name in known and name not in added]
        return sum(meta.numel() * self.written_dtype(meta).itemsize for meta in metas)

    def written_dtype(self, tensor: torch.Tensor) -> torch.dtype:
        """A checkpoint's own dtypes are kept unless another was asked for or it came from GGUF."""
        keep = self.request.recipe.dtype == "auto" and not self.model.from_gguf
        return tensor.dtype if keep or not tensor.is_floating_point() else self.dtype

    def costs(self, joins: Sequence[Sequence[str]] = ()) -> list[Costs]:
        """The choices for every weight, priced in what the asked ratio counts; see costs.costs."""
        request, size = self.request, self.dtype.itemsize
        return costs(request.method, self.sites, len(self.blocks), size, request.recipe.ratio_of, joins)

    @property
    def embeddings(self) -> list[Site]:
        """The site of the input embeddings, if they are a target."""
        return [site for site in self.sites if site.lookup]

    def sites_of(self, block: int) -> list[Site]:
        """The sites of one block; block len(blocks) is everything outside, but for embeddings, which are the next."""
        return [site for site in self.sites if site.block == block]


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
    return Request(recipe, method, allocator, sources, resolve_device(recipe.device))


def _may_join(method: Method) -> bool:
    return getattr(method.options, "join", "none") != "none"


def split_samples(specs: Sequence[CalibrationSpec]) -> list[tuple[Source, int, int]]:
    """(source, samples, seqlen) each; their files are checked."""
    return [(parse_source(spec.source), spec.samples, spec.seqlen) for spec in specs]


def share_samples(sources: Sequence[str], samples: int, seqlen: int) -> list[CalibrationSpec]:
    """Calibration of several SPECs on a command line: `samples` in all, shared by their weights."""
    counts = shares([parse_source(source).weight for source in sources], samples)
    return [CalibrationSpec(source=s, samples=n, seqlen=seqlen) for s, n in zip(sources, counts, strict=True) if n]


def open_request(request: Request, reporter: Reporter, *, calibrate: bool = True) -> Opened:
    """Open the model, probe it with real tokens, find sites and groups."""
    opened = open_parts(request, reporter)
    check_amount(opened)
    if calibrate:
        calibrate_model(opened, reporter)
    return opened


def open_parts(request: Request, reporter: Reporter) -> Opened:
    """Open the model and the base, without a look at how much is asked for."""
    opened = open_targets(request, reporter)
    refuse_tied(opened.skeleton, [site for site in opened.sites if not site.lookup])
    warn_few_targets(opened.skeleton, opened.sites, reporter)
    total = sum(parameter.numel() for parameter in opened.skeleton.parameters())
    for name, numbers in opened.towers.items():
        reporter.say(f"left dense beside the language model: {name}, {numbers / total:.1%} of the model's parameters")
    open_base(opened)
    return opened


def open_targets(request: Request, reporter: Reporter) -> Opened:
    """Open the model and find its sites; each is a group of its own until it is calibrated."""
    recipe = request.recipe
    reporter.say(f"opening {recipe.model}" + (" (GGUF: converted once, then cached)" if is_gguf(recipe.model) else ""))
    team = processes()
    if not team.first:
        team.wait()  # while the first one downloads or converts
    model = open_model(recipe.model)
    if team.first:
        team.wait()
    if (model.folder / ADAPTER).exists():
        raise InputError(
            f"model {recipe.model} has an adapter beside its weights ({ADAPTER}), which transformers loads with it: "
            "merge it into the weights with PEFT's merge_and_unload, or move it out of the folder"
        )
    said = remark(model.folder)
    if said is not None:
        reporter.warn(said)
    config = read_sound_config(model.folder, trust_remote_code=recipe.trust_remote_code)
    skeleton = empty_model(config, trust_remote_code=recipe.trust_remote_code)
    experts = linearise(skeleton)
    reader = _tensors(request, model, skeleton)
    if reader.in_fp8:
        reporter.say(f"its weights in fp8 are read as {str(reader.dtype).removeprefix('torch.')}, and count as such")
    blocks = find_blocks(skeleton)
    tokens, whole = request.method.takes_tokens, recipe.size is not None  # a size is the whole model's
    sites = find_sites(skeleton, blocks, recipe.target, recipe.ignore, tokens=tokens, whole=tokens and whole)
    if isinstance(reader, Multiplied):
        sites = _stored_sites(reader, sites, recipe.model)
        reader.add_biases(skeleton)
    stored = torch.bfloat16 if model.from_gguf else reader.dtype
    dtype = resolve_dtype(recipe.dtype, stored)
    walker = BlockWalker(skeleton, reader, request.device, compute_dtype(request.device, reader.dtype))
    for name in walker.untied:
        reporter.say(f"{name} is no copy of the tensor that the config ties it to: both are kept, as transformers does")
        sites = [replace(site, head=None) if site.lookup and f"{site.head}.weight" == name else site for site in sites]
    with library_errors(f"model {recipe.model} cannot be run as its config says"):
        sites = _called(sites, walker, reporter)
    opened = Opened(request, model, reader, skeleton, walker, sites, dtype, None, experts)
    warn_left_out(opened, reporter)
    opened.sites = [replace(site, itemsize=_dense_itemsize(opened, site)) for site in opened.sites]
    return opened


def _dense_itemsize(opened: Opened, site: Site) -> int | None:
    """See Site.itemsize: where a checkpoint's dtypes are mixed, a weight that stays dense keeps its own."""
    key = opened.walker.names.get(site.name + ".weight")
    if key is None or site.stored is not None:  # a tied weight, which is never stored as a site's
        return None
    own = opened.written_dtype(opened.reader.meta(key)).itemsize
    return None if own == opened.dtype.itemsize else own


def _tensors(request: Request, model: OpenedModel, skeleton: nn.Module) -> CheckpointReader:
    """The dense model's tensors; InputError where it is compressed in a way that cannot be compressed further."""
    manifest = read_manifest(model.folder)
    if manifest is None:
        refuse_compressed(model)
        return ExpertReader(model.folder, skeleton)
    recipe, method = request.recipe, request.method
    said = f"model {recipe.model} is compressed already ({manifest.method})"
    if not method.retruncates:
        cure = " or auto with --format low_rank or pivoted" if method.name == "auto" else ""
        raise InputError(f"{said}: lord and welore{cure} compress it further, other methods start from the dense model")
    if recipe.ratio_of != "bytes" or recipe.max_loss is not None or method.options.toward_dense:
        raise InputError(
            f"{said}: ratio_of, max_loss and toward_dense are about the dense model, which is not here; ask for a "
            "--ratio of its bytes or a --size"
        )
    if linear_experts(skeleton):
        raise InputError(f"{said}: models with experts are compressed from the dense model only")
    return Multiplied(model.folder, manifest, recipe.model)


def _stored_sites(reader: Multiplied, sites: Sequence[Site], label: str) -> list[Site]:
    """The sites with what they are stored as; a bias counts as the dense layer's only where that had one."""
    missing = reader.specs.keys() - {site.name for site in sites}
    if missing:
        raise InputError(f"model {label} compresses {min(missing)}, which is no target here: let --target include it")
    return [replace(site, stored=reader.specs.get(site.name)) for site in sites]


def open_base(opened: Opened) -> None:
    """Give an existing base its weights; InputError where it does not fit the model, the targets or the metric."""
    request = opened.request
    base = request.method.existing_base
    if base is None:
        return
    model_type = str(opened.skeleton.config.model_type)  # type: ignore[union-attr]
    dense = Dense(opened.reader, opened.walker.names, opened.skeleton, opened.sites, model_type, opened.dtype)
    base.weights = open_existing(base.folder, dense)
    specs = base.weights.specs
    for pattern in request.recipe.target:
        asked = names_matching(pattern, (site.name for site in opened.sites), "--target")
        if asked and not specs.keys() & set(asked):
            raise InputError(
                f"base {base.text} leaves dense what --target {pattern!r} asks for: there is nothing to correct"
            )
    biased = next((name for name, spec in specs.items() if spec.added_bias), None)
    if biased is not None and request.method.metric == "plain":
        raise InputError(
            f"base {base.text} has added a bias to {biased} for its inputs' mean, which metric=plain knows nothing of: "
            "use metric=input"
        )


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
        ranks = method.curve(site, size).ranks.tolist()
        specs = [method.spec(site, rank, size) for rank in (ranks[0], ranks[-2])] if len(ranks) > 1 else []
        stored = [stored_tensors(spec, opened.dtype) for spec in specs]
        total += max((sum(entry(f"{site.name}.{k}", t.shape) for k, t in one.items()) for one in stored), default=0)
    return total


def check_amount(opened: Opened) -> None:
    """Refuse a ratio or a size that cannot be reached, before any text is read."""
    recipe = opened.request.recipe
    blocks = isinstance(opened.request.method, GgmlBlocks)  # whose types are still to be found
    if recipe.rank is None and recipe.max_loss is None and not blocks:
        budget_of(opened, opened.costs())


def calibrate_model(opened: Opened, reporter: Reporter) -> None:
    """Read the text, probe the model with its first block of tokens, group the sites by their inputs.

    A method that needs no statistics still gets the held-out windows, to judge the result by.
    """
    recipe = opened.request.recipe
    tokenizer = opened.model.tokenizer(trust_remote_code=recipe.trust_remote_code)
    wanted = opened.request.method.needs_statistics
    sources = [(source, samples if wanted else 0, seqlen) for source, samples, seqlen in opened.request.sources]
    windows = MOST_HELD_OUT if recipe.refine is not None else None  # training is judged by them too
    opened.calibration = calibration_blocks(
        sources, tokenizer, recipe.seed, opened.model.folder, windows, trust_remote_code=recipe.trust_remote_code
    )
    ids = torch.cat([opened.calibration.ids, opened.calibration.held_out])
    if not len(ids):
        raise InputError("the calibration text has no held-out window to judge the result by: use more text")
    check_tokens(ids, opened.vocabulary, recipe.model)
    if warning := length_warning(opened.skeleton, ids.shape[1]):
        reporter.warn(f"--seqlen: {warning}")
    with torch.no_grad(), library_errors(f"model {recipe.model} cannot be run as its config says"):
        groups = opened.walker.probe(ids[0], [site.name for site in opened.sites if not site.lookup])
    opened.sites = _by_outputs(group_sites(opened.sites, groups), opened)


def _by_outputs(sites: list[Site], opened: Opened) -> list[Site]:
    """The sites, marked where statistics are of outputs: of weights alone in their groups, of no expert.

    None where blocks compute in half precision: its outputs are rounded, its inputs are what the layer really reads.
    """
    if opened.walker.dtype != torch.float32:
        return sites
    sizes = Counter(site.group for site in sites)
    method = opened.request.method

    def alone(site: Site) -> bool:
        return sizes[site.group] == 1 and experts_of(site.name, opened.experts) is None

    return [replace(site, by_outputs=alone(site) and method.outputs_suffice(site)) for site in sites]


def _called(sites: list[Site], walker: BlockWalker, reporter: Reporter) -> list[Site]:
    """The sites whose layers are called when their block runs; others' weights are read past them (Mamba's dt_proj)."""
    every = list(walker.blocks)
    uncalled = set(walker.uncalled([site.name for site in sites]))
    kinds = {site.kind for site in sites if site.name in uncalled}
    place = {every.index(block): index for index, block in enumerate(walker.blocks)}
    place |= {len(every) + beyond: len(walker.blocks) + beyond for beyond in (0, 1)}  # outside, and the embeddings
    left = [replace(s, block=place[s.block]) for s in sites if s.kind not in kinds and s.block in place]
    if silent := [block for block in every if block not in walker.blocks]:
        reporter.say(f"left as they are, for no text reaches them: {', '.join(silent)}")
    if not left:
        raise InputError(f"no weight is left to compress: the model never calls {', '.join(sorted(kinds))} as a layer")
    if kinds:
        reporter.say(
            f"left as they are, for the model reads their weights without calling them: {', '.join(sorted(kinds))}"
        )
    return left


def warn_left_out(opened: Opened, reporter: Reporter) -> None:
    """Say which tensors of the files the model has no place for, but for those that transformers passes over too."""
    known = set(opened.walker.names.values())
    passed = [*(getattr(opened.skeleton, IGNORED, None) or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    left = [name for name in opened.reader.names() if name not in known and not any(re.search(p, name) for p in passed)]
    if left:
        size = sum(meta.numel() * meta.itemsize for meta in map(opened.reader.meta, left))
        reporter.warn(
            f"{len(left)} tensors of the checkpoint, {size / 1e6:.1f} MB, have no place in the model that its config "
            f"describes and are left out, {left[0]} first"
        )


def towers(model: nn.Module, blocks: Sequence[str]) -> dict[str, int]:
    """Parameters of the modules beside the decoder blocks that hold linear layers: towers, and what joins them.

    The output head is none; each name is that of the largest module that holds no decoder block.
    """
    above = {".".join(blocks[0].split(".")[:length]) for length in range(blocks[0].count(".") + 1)}
    head, found = model.get_output_embeddings(), dict[str, int]()  # type: ignore[operator]
    for name, module in model.named_modules():
        if name in above or any(name.startswith(outer + ".") for outer in (*found, blocks[0].rpartition(".")[0])):
            continue
        if module is not head and any(is_linear(layer) for layer in module.modules()):
            found[name] = sum(parameter.numel() for parameter in module.parameters())
    return found


def warn_few_targets(model: nn.Module, sites: Sequence[Site], reporter: Reporter) -> None:
    """Say so where most of a model's parameters are no targets, and which part of those is the largest."""
    targeted = sum(site.shape[0] * site.shape[1] for site in sites)
    total = sum(parameter.numel() for parameter in model.parameters())
    weights, others = {f"{site.name}.weight" for site in sites}, dict[str, int]()
    for name, parameter in model.named_parameters():
        if name not in weights:
            kind = block_and_kind(name)[1]
            others[kind] = others.get(kind, 0) + parameter.numel()
    largest = max(others, key=lambda kind: others[kind], default="")
    if targeted < FEW_TARGETS * total:
        reporter.warn(
            f"targets hold {targeted / total:.0%} of the model's {total / 1e6:.1f} M parameters, {largest} alone "
            f"{others[largest] / total:.0%}: a ratio of the targets says little here, read that of the whole model"
        )
    elif largest and others[largest] > NOTEWORTHY * total:
        reporter.say(f"left dense, the largest: {largest}, {others[largest] / total:.0%} of the model's parameters")
