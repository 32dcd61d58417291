"""Which weights are compressed: linear layers of the decoder blocks, by structure and patterns; embeddings if asked."""

import contextlib
import copy
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lrcompress.errors import InputError, nearest
from lrcompress.model.experts import linear_experts
from lrcompress.model.lookups import input_embeddings, readers_of, row_scale
from lrcompress.model.skeleton import tied_names
from lrcompress.protocols import Site


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, a class derived from it that computes the same, or GPT-2's Conv1D, whose weight lies transposed."""
    return (
        type(module) is nn.Linear or is_conv1d(module) or (isinstance(module, nn.Linear) and _computes_linear(module))
    )


def _computes_linear(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear gives x Wᵀ + b, tried with small numbers in the place of its parameters."""
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"} or list(module.named_buffers()):
        return False
    tried = copy.copy(module)
    weight = torch.tensor([[1.0, -2.0, 0.25], [3.0, 0.5, -1.0]], device="cpu")
    bias = torch.tensor([0.5, -1.0], device="cpu") if module.bias is not None else None
    x = torch.tensor([[1.0, 2.0, -4.0]], device="cpu")
    tried._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    try:
        return torch.equal(tried(x), nn.functional.linear(x, weight, bias))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def find_sites(
    model: nn.Module,
    blocks: Sequence[str],
    target: Sequence[str],
    ignore: Sequence[str],
    *,
    tokens: bool = False,
    whole: bool = False,
) -> list[Site]:
    """The sites in the order of the model; each starts as a group of its own (see `group_sites`).

    Without `target` patterns every linear layer inside the blocks is one, but for those that choose experts so far as
    `_routers` knows them, and those that several blocks share. A pattern is a glob on the module path or `re:...`; one
    that matches nothing is an InputError. With `tokens` patterns may match the input embeddings too, which stand first;
    a head that is tied to them follows. `whole`: without patterns both are sites as well, where they can be.
    """
    embeddings = input_embeddings(model)
    if embeddings is not None and target and not tokens:
        _refuse_embeddings(model, embeddings[0], target)
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and min(m.weight.shape) > 1}  # type: ignore[arg-type]
    lookups = dict([embeddings]) if tokens and embeddings is not None else {}
    shared = _shared(model, linears, blocks)
    if target:
        wanted = set(_matching({**lookups, **linears}, target, "--target"))
    else:
        wanted = {name for name in linears if _block(name, blocks) < len(blocks)} - _routers(model, linears)
        wanted -= shared
        wanted |= _of_tokens(model, lookups, linears, blocks) if whole else set()
    dropped = set(_matching({**lookups, **linears}, ignore, "--ignore"))
    sites = [_embedding_site(model, name, blocks) for name in lookups if name in wanted - dropped]
    following = {site.head for site in sites}
    for name in linears:
        if name in wanted and name not in dropped | following:
            site = _site(linears[name], name, blocks)
            head = tokens and linears[name] is model.get_output_embeddings()  # type: ignore[operator]
            sites.append(replace(site, head=name) if head else site)
    refuse_tied(model, [site for site in sites if site.name in shared])
    if not sites:
        raise InputError(f"no weight is left to compress: {_why_none(blocks, dropped & wanted, shared)}")
    return sites


def _why_none(blocks: Sequence[str], dropped: set[str], shared: set[str]) -> str:
    """Why there is no target, and what to do."""
    if dropped:
        return "--ignore excludes every target, name fewer with it"
    stem = blocks[0].rpartition(".")[0]
    if shared:
        first = f"every linear layer of {stem}, {min(shared)} first, is another's too"
        return f"{first}: name others with --target, or keep the model dense"
    return f"{stem} has no linear layers: name others with --target"


def _shared(model: nn.Module, linears: Mapping[str, nn.Module], blocks: Sequence[str]) -> set[str]:
    """Layers of blocks whose weight is another layer's too, as in Zamba."""
    tied = tied_names(model)
    return {
        name
        for name, layer in linears.items()
        if _block(name, blocks) < len(blocks)
        and any(_holder(model, other) is not layer for other in tied.get(f"{name}.weight", ()))
    }


def _holder(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _of_tokens(
    model: nn.Module, lookups: Iterable[str], linears: Mapping[str, nn.Module], blocks: Sequence[str]
) -> set[str]:
    """The embeddings, unless what reads them has no place in a table of codes, and a head that is a layer by itself."""
    found = {name for name, layer in linears.items() if layer is model.get_output_embeddings()}  # type: ignore[operator]
    tied = {name for name in found for _ in tied_names(model).get(f"{name}.weight", ())}
    for name in lookups:
        with contextlib.suppress(InputError):
            _embedding_site(model, name, blocks)
            found.add(name)
    return found if found & set(lookups) else found - tied


def _embedding_site(model: nn.Module, name: str, blocks: Sequence[str]) -> Site:
    """The input embeddings, in a block of their own: what they are rounded by is known last, they are used first."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Embedding)
    row_scale(module)
    heads = readers_of(model, name)
    for reader in heads:
        linear = model.get_submodule(reader)
        if len(heads) > 1 or type(linear) is not nn.Linear or linear.bias is not None:
            raise InputError(
                f"{name} shares its weight with {', '.join(heads)}, which is more than an output head without a bias: "
                "leave it out of the targets"
            )
    shape = (module.num_embeddings, module.embedding_dim)
    head = heads[0] if heads else None
    return Site(name, shape, len(blocks) + 1, name, False, kind=name, lookup=True, head=head)


def _refuse_embeddings(model: nn.Module, name: str, target: Sequence[str]) -> None:
    """InputError where a pattern names the input embeddings and no linear layer."""
    linears = [other for other, module in model.named_modules() if is_linear(module)]
    for pattern in target:
        if names_matching(pattern, [name], "--target") and not names_matching(pattern, linears, "--target"):
            raise InputError(
                f"--target {pattern!r} names the input embeddings, which this method does not compress: "
                "use --method ecsq, or leave them out"
            )


def _routers(model: nn.Module, linears: Iterable[str]) -> set[str]:
    """Those of the layers that choose among fused experts: the only one in a module beside them, an output for each."""
    holders, found = linear_experts(model), set()
    inside: dict[str, dict[str, list[str]]] = {holder.rpartition(".")[0]: {} for holder in holders}
    for linear in linears:
        parts = linear.split(".")
        for depth in range(1, len(parts)):
            children = inside.get(".".join(parts[:depth]))
            if children is not None:
                children.setdefault(parts[depth], []).append(linear)
    for holder, experts in holders.items():
        parent, _, own = holder.rpartition(".")
        for name, within in inside[parent].items():
            if name != own and len(within) == 1:
                outputs = model.get_submodule(within[0]).weight.shape[0]  # type: ignore[operator,union-attr,index]
                found |= set(within) if outputs == experts.count else set()
    return found


def group_sites(sites: Sequence[Site], groups: dict[str, str]) -> list[Site]:
    """The sites with the groups that the probe found: those that read the same input."""
    return [replace(site, group=groups.get(site.name, site.name)) for site in sites]


def _site(module: nn.Module, name: str, blocks: Sequence[str]) -> Site:
    conv1d = is_conv1d(module)
    rows, columns = module.weight.shape  # type: ignore[misc,union-attr]
    shape = (int(columns), int(rows)) if conv1d else (int(rows), int(columns))  # type: ignore[arg-type]
    block = _block(name, blocks)
    kind = name[len(blocks[block]) + 1 :] if block < len(blocks) else name
    return Site(name, shape, block, name, module.bias is not None, conv1d, kind)


def _block(name: str, blocks: Sequence[str]) -> int:
    """Index of the block that holds the module, len(blocks) for one outside."""
    stem = blocks[0].rpartition(".")[0] + "."
    head = name.removeprefix(stem).split(".")[0]
    return int(head) if name.startswith(stem) and head.isdigit() else len(blocks)


def _matching(linears: Mapping[str, nn.Module], patterns: Sequence[str], option: str) -> list[str]:
    matched: list[str] = []
    for pattern in patterns:
        hits = names_matching(pattern, linears, option)
        if not hits:
            raise InputError(f"{option} {pattern!r} matches no linear layer: {nearest(pattern, list(linears)[:40])}")
        matched += hits
    return matched


def names_matching(pattern: str, names: Iterable[str], option: str) -> list[str]:
    """Those of `names` that a pattern matches; InputError where it is no regular expression."""
    try:
        rule = re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except re.error as error:
        raise InputError(f"{option} {pattern!r} is no regular expression: {error}") from error
    return [name for name in names if (rule.search(name) if pattern.startswith("re:") else rule.match(name))]


def refuse_tied(model: nn.Module, sites: Sequence[Site]) -> None:
    """InputError where a site's weight is that of another module too."""
    tied = tied_names(model)
    for site in sites:
        others = sorted(tied.get(f"{site.name}.weight", ()))
        if others:
            both = "name the embeddings, and both are compressed as one"
            cure = "leave it out with --ignore" if site.head is None else both
            raise InputError(
                f"{site.name} shares its weight with {', '.join(others)}: a tied weight cannot be compressed "
                f"by itself; {cure}"
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


def untouched(model: nn.Module, blocks: Sequence[str], compressed: Iterable[str]) -> dict[str, int]:
    """Those of the `towers` in which no layer is among the compressed ones."""
    own = [f"{name}." for name in compressed]
    return {n: size for n, size in towers(model, blocks).items() if not any(name.startswith(f"{n}.") for name in own)}
