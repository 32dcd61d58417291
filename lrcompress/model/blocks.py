"""Running a model block by block: only one block's weights are in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.model.calls import (
    Call,
    Probed,
    call_of,
    handed_by,
    handing_on,
    hidden_of,
    passed_on,
    same_calls,
    tuple_length,
    with_hidden,
)
from lrcompress.model.carried import Handed, Layout, containers, put
from lrcompress.model.device import release_freed
from lrcompress.model.experts import experts_of, linear_experts
from lrcompress.model.limits import known_tokens
from lrcompress.model.skeleton import checkpoint_names, find_blocks, language_model, tie_as_stored, tied_names
from lrcompress.protocols import TensorSource

PROBED = 16
"""Tokens that a model is run on to see what its blocks and layers read."""


UNWALKABLE = "lrcompress cannot calibrate such a model yet, please report its type"


class _HiddenCaptured(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Ran(Exception):
    """A block has run, and nothing behind it needs to."""

    def __init__(self, handed: Handed) -> None:
        self.handed = handed


def _shared_names(model: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """Model name to stored name of parameters that the files hold under another name of theirs (Zamba's blocks)."""
    found = {}
    for name, others in tied_names(model).items():
        holder = next((other for other in sorted(others) if other in names), None)
        if name not in names and holder is not None:
            found[name] = names[holder]
    return found


class BlockWalker:
    """A model whose blocks are loaded, run and dropped one at a time; the rest of it stays in memory.

    How a block is called is learnt by running the model on real tokens (`probe`), so no architecture is named. Where
    blocks read more than the hidden states of the one before, a sample's state holds everything that it carries
    (`carried.Layout`), and the model itself calls a block, the others left out; otherwise it is the hidden states.
    `untied` names parameters that the config ties to others while the files hold another matrix for each.
    """

    def __init__(self, model: nn.Module, source: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.source, self.device, self.dtype = model, source, device, dtype
        self.blocks = find_blocks(model)
        self.names = checkpoint_names(model, source.names(), source.made())
        _check_shapes(model, self.names, source)
        self._known = {**self.names, **_shared_names(model, self.names)}
        self.calls: list[Call] = []
        self.layouts: list[Layout] = []
        """What enters each block, and what leaves the last one; empty where that is hidden states alone."""
        self._width = 0
        self._text = language_model(model, self.blocks)
        self._last = 0
        prefixes = tuple(block + "." for block in self.blocks)
        self._outside = {k: v for k, v in self.names.items() if not k.startswith(prefixes)}
        self._loaded = False
        self.untied: list[str] = []
        if getattr(model, "all_tied_weights_keys", None):
            self._load_resident()

    @property
    def bytes_to_come(self) -> int:
        """Of what lies outside of the blocks, and is not in memory before the model runs for the first time."""
        metas = [] if self._loaded else [self.source.meta(stored) for stored in self._outside.values()]
        return sum(meta.numel() * self._dtype_of(meta).itemsize for meta in metas)

    def _load_resident(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        self.model.load_state_dict(self._read(self._outside), strict=False, assign=True)
        self.untied = tie_as_stored(self.model, self.names)
        for module_name, module in self.model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta" and f"{module_name}.{name}" not in self.names:
                    setattr(module, name, buffer.to(self.device))
        self.model.requires_grad_(False)

    def _read(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Tensors by model name, floating ones in the compute dtype, on the device."""
        stored = {v: k for k, v in names.items()}
        return {
            stored[name]: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in self.source.read(list(stored))
        }

    @contextmanager
    def _hollow(self, name: str, names: Iterable[str]) -> Iterator[None]:
        """While open, the tensors `names` of module `name` are zeros that take no memory, all one number."""
        module, stem = (self.model.get_submodule(name), f"{name}.") if name else (self.model, "")
        state = module.state_dict(prefix=stem)
        metas = {key.removeprefix(stem): state[key] for key in names}
        zeros = {
            key: torch.zeros((), dtype=self._dtype_of(meta), device=self.device).expand(meta.shape)
            for key, meta in metas.items()
        }
        module.load_state_dict(zeros, strict=False, assign=True)
        module.requires_grad_(False)
        try:
            yield
        finally:
            empty = {key: torch.empty(meta.shape, dtype=meta.dtype, device="meta") for key, meta in metas.items()}
            module.load_state_dict(empty, strict=False, assign=True)

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        """The one that a tensor is computed with."""
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, which are dropped again at the end; the next one is fetched meanwhile."""
        name = self.blocks[index]
        module = self.model.get_submodule(name)
        tensors = {k[len(name) + 1 :]: v for k, v in self._read(self._names_in(index)).items()}
        following = index + (1 if index >= self._last else -1)
        self._last = index
        if 0 <= following < len(self.blocks):
            self.source.will_read(list(self._names_in(following).values()))
        module.load_state_dict(tensors, assign=True)
        module.requires_grad_(False)
        try:
            yield module
        finally:
            empty = {k: torch.empty_like(v, device="meta") for k, v in tensors.items()}
            module.load_state_dict(empty, assign=True)
            del tensors
            release_freed()

    def _names_in(self, index: int) -> dict[str, str]:
        """Model name to stored name of block `index`'s tensors, those of an earlier block that it shares among them."""
        return {k: v for k, v in self._known.items() if k.startswith(self.blocks[index] + ".")}

    def run(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """A sample's state (1, length, width) after block `index`, called as the model calls it."""
        if self.layouts:
            return self._run_within(index, module, hidden)
        call = self.calls[index]
        if call.hidden_key is None:
            output = module(hidden, *call.args, **call.kwargs)
        else:
            output = module(*call.args, **{call.hidden_key: hidden}, **call.kwargs)
        result: Tensor = output[0] if tuple_length(output) else output
        return result

    def _run_within(self, index: int, module: nn.Module, state: Tensor) -> Tensor:
        """As `run`, by running the whole model with the blocks before left out and those behind not reached."""
        ids, handed = self.layouts[index].unpack(state)
        forward = module.forward

        def step(block: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if block < index:
                    return handing_on(handed, self.calls[block].tuple_length)
                if index == 0:
                    args, kwargs = with_hidden(args, kwargs, handed.hidden)
                into = containers(args, kwargs)
                for place in into.keys() & handed.kept.keys():
                    put(into[place], handed.kept[place])
                raise _Ran(handed_by(forward(*args, **kwargs), into, handed.kept))

            return call

        try:
            with self._blocks_replaced(step):
                self._forward(ids)
        except _Ran as ran:
            return self.layouts[index + 1].pack(ids, ran.handed, self._width, self.dtype)
        raise InputError(f"the model never called {self.blocks[index]}: {UNWALKABLE}")

    def hidden(self, state: Tensor) -> Tensor:
        """The hidden states in a sample's state that left the last block or any that gives as many."""
        return self.layouts[-1].hidden(state) if self.layouts else state

    def embed(self, ids: Tensor) -> Tensor:
        """The state (1, length, width) of the sample ids (length,) that enters the first block."""
        found: list[Handed] = []

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(handed_by(hidden_of(args, kwargs)[0], containers(args, kwargs), {}))
            raise _HiddenCaptured(found[0].hidden)

        first = self.model.get_submodule(self.blocks[0])
        handle = first.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            self._forward(ids)
        except _HiddenCaptured as captured:
            if self.layouts:
                return self.layouts[0].pack(ids.to(self.device), found[0], self._width, self.dtype)
            return captured.hidden
        finally:
            handle.remove()
        raise InputError(f"the model never called its first block: {UNWALKABLE}")

    def uncalled(self, names: Sequence[str]) -> list[str]:
        """Those of the layers `names` that their block does not call when it runs: it reads their weights.

        Of the blocks that hold layers of the same names and shapes the first one is run, on zeros in the place of its
        weights, and stands for all. An expert counts as called. Blocks that a text does not reach are no longer among
        `blocks`.
        """
        experts = linear_experts(self.model)
        seen = {name for name in names if experts_of(name, experts) is not None}
        before: list[Any] = []
        reached: set[int] = set()
        tried = {*self._different_blocks(names)}
        outside = [] if self._loaded else list(self._outside)

        def run(index: int) -> Callable[..., Any]:
            forward = self.model.get_submodule(self.blocks[index]).forward

            def call(*args: Any, **kwargs: Any) -> Any:
                hidden, _ = hidden_of(args, kwargs)
                if containers(args, kwargs):  # what a later block finds in there, any block may have put in
                    tried.update(range(len(self.blocks)))
                reached.add(index)
                if index in tried:
                    with self._hollow(self.blocks[index], self._names_in(index)):
                        before[:] = [forward(*args, **kwargs)]
                    return before[-1]
                return type(before[-1])([hidden, *before[-1][1:]]) if tuple_length(before[-1]) else hidden

            return call

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _HiddenCaptured(args[0])

        def note(name: str) -> Callable[..., None]:
            return lambda *_: seen.add(name)

        handles = [self.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
        head = self._text.get_output_embeddings()  # type: ignore[operator]
        handles += [] if head is None else [head.register_forward_pre_hook(stop)]
        try:
            with torch.no_grad(), self._hollow("", outside), self._blocks_replaced(run), suppress(_HiddenCaptured):
                self._text(
                    input_ids=(torch.arange(4) % known_tokens(self.model)).to(self.device)[None], use_cache=False
                )
        finally:
            for handle in handles:
                handle.remove()
        stems = tuple(self.blocks[index] + "." for index in reached & tried)
        own = {name for name in names if name.startswith(stems)}
        self.blocks = [block for index, block in enumerate(self.blocks) if index in reached]
        if not self.blocks:
            raise InputError(f"the model never called a block for a text: {UNWALKABLE}")
        return [name for name in names if name in own - seen]

    def _different_blocks(self, names: Sequence[str]) -> list[int]:
        """The first block of those whose layers among `names` are called the same and as large, for each such set."""
        first: dict[frozenset[Any], int] = {}
        inside: dict[str, list[str]] = {block: [] for block in self.blocks}
        depth = self.blocks[0].count(".") + 1
        for name in names:
            inside.get(".".join(name.split(".")[:depth]), []).append(name)
        for index, block in enumerate(self.blocks):
            layers = {name: self.model.get_submodule(name) for name in inside[block]}
            own = frozenset((name.removeprefix(block), layer.weight.shape) for name, layer in layers.items())
            if own:
                first.setdefault(own, index)
        return [0, *(index for index in first.values() if index)]

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """(1, length, vocabulary) for the state that left the last block; ids are those it came from, or a part."""
        left = self.hidden(hidden)

        def skip(index: int) -> Callable[..., Any]:
            return lambda *_, **__: passed_on(left, self.calls[index].tuple_length)

        with self._blocks_replaced(skip):
            output: Tensor = self._forward(ids).logits
            return output

    def probe(self, ids: Tensor, sites: Sequence[str]) -> dict[str, str]:
        """Learn how blocks are called for ids (length,), and which sites read the same input.

        Runs the whole model once on the first PROBED of them, a block in memory at a time, then on all what calls the
        blocks; on all of it too where blocks hand each other more than hidden states. Returns for every site the first
        site that reads what it reads. InputError where blocks read what no sample's state can carry.
        """
        self.layouts, short = [], ids[: max(1, min(PROBED, len(ids) // 2))]
        first = self._run_probed(short, sites)

        def learn(text: Tensor) -> list[Call]:
            if first.handed_on:
                self._run_probed(text, [])
            else:
                self._note_calls(text)
            return self.calls

        if first.between or (first.handed_on and not self._same_for(short.flip(0))):
            self._carry(ids, first, len(short))
        else:
            other, self.calls = learn(ids.flip(0)), learn(ids)
            if not same_calls(self.calls, other):
                self._carry(ids, first, len(short))
        groups = first.groups
        return groups | _unrouted([site for site in sites if site not in groups], linear_experts(self.model))

    def _same_for(self, ids: Tensor) -> bool:
        """Whether blocks are called for ids as they were last."""
        known = self.calls
        self._run_probed(ids, [])
        return same_calls(known, self.calls)

    def _carry(self, ids: Tensor, short: Probed, length: int) -> None:
        """Learn what samples as long as ids carry from block to block, and make sure that it is all they need."""
        whole = self._run_probed(ids, [])
        try:
            pairs = zip(whole.handed, short.handed, strict=True)
            self.layouts = [Layout(one, two, (len(ids), length)) for one, two in pairs]
        except ValueError as error:
            raise InputError(f"{self._stem} hand each other {error}: {UNWALKABLE}") from error
        self._width = max(layout.channels for layout in self.layouts)
        with torch.no_grad():
            state = self.embed(ids)
            for index in range(len(self.blocks)):
                with self.block(index) as module:
                    state = self.run(index, module, state)
            found, expected = self.logits(ids, state).float(), whole.logits.float()
        if not bool((found - expected).abs().max() <= self._tolerance * expected.abs().max()):
            raise InputError(
                f"{self._stem} do not give what the whole model does when they run one by one: {UNWALKABLE}"
            )

    @property
    def _stem(self) -> str:
        return "the blocks " + self.blocks[0].rpartition(".")[0]

    @property
    def _tolerance(self) -> float:
        """Of the largest logit: what rounding in the compute dtype may make of it."""
        return 64 * float(torch.finfo(self.dtype).eps) ** 0.9

    def _note_calls(self, ids: Tensor) -> None:
        """Learn how blocks are called for ids, of a model whose blocks are known already and are left out."""
        lengths, noted = [call.tuple_length for call in self.calls], list[Call]()

        def note(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden, key = hidden_of(args, kwargs)
                noted.append(call_of(args, kwargs, key, lengths[index]))
                if index + 1 == len(self.blocks):
                    raise _HiddenCaptured(hidden)
                return passed_on(hidden, lengths[index])

            return call

        with self._blocks_replaced(note), suppress(_HiddenCaptured):
            self._forward(ids)
        self.calls = noted
        self._check_calls()

    def _check_calls(self) -> None:
        if len(self.calls) != len(self.blocks):
            raise InputError(
                f"the model called blocks {len(self.calls)} times, of which it has {len(self.blocks)}: {UNWALKABLE}"
            )

    def _run_probed(self, ids: Tensor, sites: Sequence[str]) -> Probed:
        """Run the whole model on ids, a block in memory at a time, and learn how its blocks are called."""
        found = Probed()
        self.calls = []
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
            forward = self.model.get_submodule(self.blocks[index]).forward

            def run(*args: Any, **kwargs: Any) -> Any:
                hidden, key = hidden_of(args, kwargs)
                into = containers(args, kwargs)
                if not outputs:
                    found.note(handed_by(hidden, into, {}))
                with self.block(index):
                    output = forward(*args, **kwargs)
                found.between |= hidden.dim() != 3 or hidden.shape[:2] != (1, len(ids))
                found.between |= bool(outputs) and hidden.data_ptr() != outputs[-1].data_ptr()
                handed = handed_by(output, into, found.kept)
                found.handed_on |= bool(into) or any(extra is not None for extra in handed.extras)
                found.note(handed)
                self.calls.append(call_of(args, kwargs, key, tuple_length(output)))
                outputs[:] = [handed.hidden]
                alive.clear()
                first.clear()
                return output

            return run

        handles = [self.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in sites]
        try:
            with self._blocks_replaced(walk):
                found.logits = self._forward(ids).logits
        finally:
            for handle in handles:
                handle.remove()
        self._check_calls()
        return found

    @contextmanager
    def _blocks_replaced(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """While open, calling block i calls forward(i) instead."""
        modules = [self.model.get_submodule(name) for name in self.blocks]
        for index, module in enumerate(modules):
            module.forward = forward(index)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def _forward(self, ids: Tensor) -> Any:
        self._load_resident()
        return self._text(input_ids=ids.to(self.device)[None], use_cache=False)


def _unrouted(sites: Sequence[str], experts: Iterable[str]) -> dict[str, str]:
    """As BlockWalker.probe, for sites of experts to which nothing was sent: all but down_proj read the same."""
    first: dict[str, str] = {}
    names = [name for name in sites if experts_of(name, experts) is not None]
    return {
        name: name if name.endswith(".down_proj") else first.setdefault(name.rpartition(".")[0], name) for name in names
    }


def _check_shapes(model: nn.Module, names: dict[str, str], source: TensorSource) -> None:
    """InputError where a stored tensor is not what the config makes of it."""
    for name, expected in model.state_dict().items():
        if name not in names:
            continue
        stored = source.meta(names[name])
        if stored.shape != expected.shape or stored.is_floating_point() != expected.is_floating_point():
            raise InputError(
                f"the checkpoint stores {names[name]} as {tuple(stored.shape)} {stored.dtype}, its config makes it "
                f"{tuple(expected.shape)} {expected.dtype}: they do not belong together"
            )
