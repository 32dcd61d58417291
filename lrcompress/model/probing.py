"""Finding out how a model's blocks are called, and what they and their layers read, by running it on few tokens."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.model.blocks import BlockWalker, HiddenCaptured, UnwalkableError
from lrcompress.model.calls import (
    Call,
    Probed,
    call_of,
    handed_by,
    hidden_of,
    passed_on,
    same_calls,
    tuple_length,
    with_first,
)
from lrcompress.model.carried import Layout, containers
from lrcompress.model.experts import experts_of, linear_experts
from lrcompress.model.limits import known_tokens
from lrcompress.model.samples import Sample
from lrcompress.model.skeleton import find_blocks

PROBED = 16
"""Tokens that a model is run on to see what its blocks and layers read."""


def probe(walker: BlockWalker, ids: Tensor, sites: Sequence[str]) -> dict[str, str]:
    """Learn how blocks are called for ids (length,), and which sites read the same input.

    Runs the whole model once on the first PROBED of them, a block in memory at a time, then on all what calls the
    blocks; on all of it too where blocks hand each other more than hidden states. Returns for every site the first
    site that reads what it reads. InputError where blocks read what no sample's state can carry.
    """
    walker.layouts, short = [], ids[: max(1, min(PROBED, len(ids) // 2))]
    first = _run_probed(walker, short, sites)

    def learn(text: Tensor) -> list[Call]:
        if first.handed_on:
            _run_probed(walker, text, [])
        else:
            _note_calls(walker, text)
        return walker.calls

    if first.between or (first.handed_on and not _same_for(walker, short.flip(0))):
        _carry(walker, ids, first, len(short))
    else:
        other, walker.calls = learn(ids.flip(0)), learn(ids)
        if not same_calls(walker.calls, other):
            _carry(walker, ids, first, len(short))
    groups = first.groups
    return groups | _unrouted([site for site in sites if site not in groups], linear_experts(walker.model))


def check_look(walker: BlockWalker, sample: Sample) -> None:
    """InputError where a sample with images reaches blocks that no text does: these are not walked."""
    silent = [name for name in find_blocks(walker.model) if name not in walker.blocks]

    def refuse(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            raise InputError(
                f"{name} runs only where there are images, and would have to be calibrated too: calibrate on text alone"
            )

        return hook

    def skip(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: passed_on(hidden_of(args, kwargs)[0], walker.calls[index].tuple_length)

    handles = [walker.model.get_submodule(name).register_forward_pre_hook(refuse(name)) for name in silent]
    try:
        if silent:
            with torch.no_grad(), walker.blocks_replaced(skip):
                walker.call(sample)
    finally:
        for handle in handles:
            handle.remove()


def uncalled(walker: BlockWalker, names: Sequence[str]) -> list[str]:
    """Those of the layers `names` that their block does not call when it runs: it reads their weights.

    Of the blocks that hold layers of the same names and shapes the first one is run, on zeros in the place of its
    weights, and stands for all. An expert counts as called. Blocks that a text does not reach are no longer among
    `blocks`. What torch's own attention projects its output by is never called, within a block or outside.
    """
    experts = linear_experts(walker.model)
    seen = {name for name in names if experts_of(name, experts) is not None}
    before: list[Any] = []
    reached: set[int] = set()
    tried = {*_different_blocks(walker, names)}
    outside = list(walker.unread)

    def run(index: int) -> Callable[..., Any]:
        forward = walker.model.get_submodule(walker.blocks[index]).forward

        def call(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = hidden_of(args, kwargs)
            if containers(args, kwargs):  # what a later block finds in there, any block may have put in
                tried.update(range(len(walker.blocks)))
            reached.add(index)
            if index in tried:
                with walker.hollow(walker.blocks[index], walker.names_in(index)):
                    before[:] = [forward(*args, **kwargs)]
                return before[-1]
            return with_first(before[-1], hidden)

        return call

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise HiddenCaptured(args[0])

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.add(name)

    handles = [
        walker.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names if name not in seen
    ]
    head = walker.text.get_output_embeddings()  # type: ignore[operator]
    handles += [] if head is None else [head.register_forward_pre_hook(stop)]
    try:
        with torch.no_grad(), walker.hollow("", outside), walker.blocks_replaced(run), suppress(HiddenCaptured):
            walker.text(
                input_ids=(torch.arange(4) % known_tokens(walker.model)).to(walker.device)[None], use_cache=False
            )
    finally:
        for handle in handles:
            handle.remove()
    stems = tuple(walker.blocks[index] + "." for index in reached & tried)
    own = {name for name in names if name.startswith(stems)}
    walker.blocks = [block for index, block in enumerate(walker.blocks) if index in reached]
    if not walker.blocks:
        raise InputError(
            "the model never called a block for a text, so that nothing says which weights it multiplies by: save the "
            "language model that it holds with its save_pretrained, and compress that"
        )
    return [name for name in names if name in own - seen or _read_by_torch(walker.model, name)]


def _read_by_torch(model: nn.Module, name: str) -> bool:
    """Whether a layer is one of torch's own attention, which multiplies by its weight without calling it."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _same_for(walker: BlockWalker, ids: Tensor) -> bool:
    """Whether blocks are called for ids as they were last."""
    known = walker.calls
    _run_probed(walker, ids, [])
    return same_calls(known, walker.calls)


def _carry(walker: BlockWalker, ids: Tensor, short: Probed, length: int) -> None:
    """Learn what samples as long as ids carry from block to block, and make sure that it is all they need."""
    whole = _run_probed(walker, ids, [])
    try:
        pairs = zip(whole.handed, short.handed, strict=True)
        walker.layouts = [Layout(one, two, (len(ids), length)) for one, two in pairs]
    except ValueError as error:
        raise UnwalkableError(f"{_stem(walker)} hand each other {error}") from error
    walker.width = max(layout.channels for layout in walker.layouts)
    with torch.no_grad():
        state = walker.embed(ids)
        for index in range(len(walker.blocks)):
            with walker.block(index) as module:
                state = walker.run(index, module, state)
        found, expected = walker.logits(ids, state).float(), whole.logits.float()
    if not bool((found - expected).abs().max() <= _tolerance(walker) * expected.abs().max()):
        raise UnwalkableError(f"{_stem(walker)} do not give what the whole model does when they run one by one")


def _stem(walker: BlockWalker) -> str:
    return "the blocks " + walker.blocks[0].rpartition(".")[0]


def _tolerance(walker: BlockWalker) -> float:
    """Of the largest logit: what rounding in the compute dtype may make of it."""
    return 64 * float(torch.finfo(walker.dtype).eps) ** 0.9


def _note_calls(walker: BlockWalker, ids: Tensor) -> None:
    """Learn how blocks are called for ids, of a model whose blocks are known already and are left out."""
    lengths, noted = [call.tuple_length for call in walker.calls], list[Call]()

    def note(index: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden, key = hidden_of(args, kwargs)
            noted.append(call_of(args, kwargs, key, lengths[index]))
            if index + 1 == len(walker.blocks):
                raise HiddenCaptured(hidden)
            return passed_on(hidden, lengths[index])

        return call

    with walker.blocks_replaced(note), suppress(HiddenCaptured):
        walker.forward(ids)
    walker.calls = noted
    _check_calls(walker)


def _check_calls(walker: BlockWalker) -> None:
    if len(walker.calls) != len(walker.blocks):
        raise UnwalkableError(
            f"the model called blocks {len(walker.calls)} times, of which it has {len(walker.blocks)}"
        )


def _run_probed(walker: BlockWalker, ids: Tensor, sites: Sequence[str]) -> Probed:
    """Run the whole model on ids, a block in memory at a time, and learn how its blocks are called."""
    found = Probed()
    walker.calls = []
    first: dict[tuple[Any, ...], str] = {}
    alive: list[Tensor] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            alive.append(x)  # kept, so that no other tensor takes its address
            key = (x.data_ptr(), x.numel(), x.shape[-1], 0 if x.is_inference() else x._version)
            found.groups[name] = first.setdefault(key, name)

        return hook

    outputs: list[Tensor] = []

    def walk(index: int) -> Callable[..., Any]:
        forward = walker.model.get_submodule(walker.blocks[index]).forward

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, key = hidden_of(args, kwargs)
            into = containers(args, kwargs)
            if not outputs:
                found.note(handed_by(hidden, into, {}))
            with walker.block(index):
                output = forward(*args, **kwargs)
            found.between |= hidden.dim() != 3 or hidden.shape[:2] != (1, len(ids))
            found.between |= bool(outputs) and hidden.data_ptr() != outputs[-1].data_ptr()
            handed = handed_by(output, into, found.kept)
            found.handed_on |= bool(into) or any(extra is not None for extra in handed.extras)
            found.note(handed)
            walker.calls.append(call_of(args, kwargs, key, tuple_length(output)))
            outputs[:] = [handed.hidden]
            alive.clear()
            first.clear()
            return output

        return run

    handles = [walker.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in sites]
    try:
        with walker.blocks_replaced(walk):
            found.logits = walker.forward(ids).logits
    finally:
        for handle in handles:
            handle.remove()
    _check_calls(walker)
    return found


def _different_blocks(walker: BlockWalker, names: Sequence[str]) -> list[int]:
    """The first block of those whose layers among `names` are called the same and as large, for each such set."""
    first: dict[frozenset[Any], int] = {}
    inside: dict[str, list[str]] = {block: [] for block in walker.blocks}
    depth = walker.blocks[0].count(".") + 1
    for name in names:
        inside.get(".".join(name.split(".")[:depth]), []).append(name)
    for index, block in enumerate(walker.blocks):
        layers = {name: walker.model.get_submodule(name) for name in inside[block]}
        own = frozenset((name.removeprefix(block), layer.weight.shape) for name, layer in layers.items())
        if own:
            first.setdefault(own, index)
    return [0, *(index for index in first.values() if index)]


def _unrouted(sites: Sequence[str], experts: Iterable[str]) -> dict[str, str]:
    """As `probe`, for sites of experts to which nothing was sent: all but down_proj read the same."""
    first: dict[str, str] = {}
    names = [name for name in sites if experts_of(name, experts) is not None]
    return {
        name: name if name.endswith(".down_proj") else first.setdefault(name.rpartition(".")[0], name) for name in names
    }
