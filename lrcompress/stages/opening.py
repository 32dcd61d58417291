"""Opening the model and its base, finding its targets."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lrcompress.budget import FEW_TARGETS
from lrcompress.checkpoint.experts import ExpertReader
from lrcompress.checkpoint.folder import read_sound_config
from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.shards import remark
from lrcompress.errors import InputError
from lrcompress.foreign.existing import open_existing
from lrcompress.foreign.opening import OpenedModel, is_gguf, open_model, refuse_compressed
from lrcompress.foreign.quantised import Dense
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.device import compute_dtype, resolve_dtype
from lrcompress.model.experts import linear_experts, linearise
from lrcompress.model.probing import uncalled
from lrcompress.model.skeleton import empty_model, find_blocks, library_errors
from lrcompress.model.targets import find_sites, names_matching, refuse_tied
from lrcompress.parallel.processes import processes
from lrcompress.protocols import Site
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import block_and_kind
from lrcompress.stages.amount import check_amount
from lrcompress.stages.calibrate import calibrate_model
from lrcompress.stages.opened import Opened
from lrcompress.stages.request import Request

ADAPTER = "adapter_config.json"


IGNORED = "_keys_to_ignore_on_load_unexpected"
"""Where transformers' models keep patterns of tensors that belong to no parameter of theirs."""


NOTEWORTHY = 0.1
"""Share of a model's parameters of a part that stays dense which is worth a word."""


def open_request(request: Request, reporter: Reporter, *, calibrate: bool = True) -> Opened:
    """Open the model, probe it with real tokens, find sites and groups."""
    opened = open_parts(request, reporter)
    check_amount(opened, reporter)
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
        reporter.say(
            f"left dense beside the language model's blocks: {name}, {numbers / total:.1%} of the model's parameters"
        )
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
    cure = "are its config and its code those of its files, and does this transformers run it?"
    with library_errors(f"model {recipe.model} cannot be run as its config says", cure):
        sites = _called(sites, walker, reporter)
    opened = Opened(request, model, reader, skeleton, walker, sites, dtype, None, experts)
    warn_left_out(opened, reporter)
    sizes = [(site, _dense_itemsize(opened, site)) for site in opened.sites]
    opened.sites = [site if size == site.itemsize else replace(site, itemsize=size) for site, size in sizes]
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


def _called(sites: list[Site], walker: BlockWalker, reporter: Reporter) -> list[Site]:
    """The sites whose layers are called when their block runs; others' weights are read past them (Mamba's dt_proj)."""
    every = list(walker.blocks)
    silent_layers = set(uncalled(walker, [site.name for site in sites]))
    kinds = {site.kind for site in sites if site.name in silent_layers}
    place = {every.index(block): index for index, block in enumerate(walker.blocks)}
    place |= {len(every) + beyond: len(walker.blocks) + beyond for beyond in (0, 1)}  # outside, and the embeddings
    left = [s for s in sites if s.kind not in kinds and s.block in place]
    left = [s if place[s.block] == s.block else replace(s, block=place[s.block]) for s in left]
    if silent := [block for block in every if block not in walker.blocks]:
        reporter.say(f"left as they are, for no text reaches them: {', '.join(silent)}")
    if not left:
        never = ", ".join(sorted(kinds))
        raise InputError(
            f"no weight is left to compress: the model never calls {never} as a layer, name others with --target"
        )
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
