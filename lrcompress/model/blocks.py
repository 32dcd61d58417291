"""Running a model block by block: only one block's weights are in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.model.device import release_freed
from lrcompress.model.experts import experts_of, linear_experts
from lrcompress.model.skeleton import checkpoint_names, find_blocks, tie_as_stored
from lrcompress.protocols import TensorSource


@dataclass
class Call:
    """How the model called a block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_key: str | None
    tuple_length: int
    """0 where the block returns a tensor, else the length of the tuple that begins with it."""


PROBED = 16
"""Tokens that a model is run on to see what its blocks and layers read."""


class _HiddenCaptured(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class BlockWalker:
    """A model whose blocks are loaded, run and dropped one at a time; the rest of it stays in memory.

    How a block is called is learnt by running the model on real tokens (`probe`), so no architecture is named.
    `untied` names parameters that the config ties to others while the files hold another matrix for each.
    """

    def __init__(self, model: nn.Module, source: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.source, self.device, self.dtype = model, source, device, dtype
        self.blocks = find_blocks(model)
        self.names = checkpoint_names(model, source.names())
        _check_shapes(model, self.names, source)
        self.calls: list[Call] = []
        self._last = 0
        self._load_resident()

    def _load_resident(self) -> None:
        prefixes = tuple(block + "." for block in self.blocks)
        outside = {k: v for k, v in self.names.items() if not k.startswith(prefixes)}
        self.model.load_state_dict(self._read(outside), strict=False, assign=True)
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
        """Model name to stored name of block `index`'s tensors."""
        return {k: v for k, v in self.names.items() if k.startswith(self.blocks[index] + ".")}

    def run(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states (1, length, width) after block `index`, called as the model calls it."""
        call = self.calls[index]
        if call.hidden_key is None:
            output = module(hidden, *call.args, **call.kwargs)
        else:
            output = module(*call.args, **{call.hidden_key: hidden}, **call.kwargs)
        result: Tensor = output[0] if _tuple_length(output) else output
        return result

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states (1, length, width) that enter the first block for ids (length,)."""

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _HiddenCaptured(_hidden(args, kwargs)[0])

        first = self.model.get_submodule(self.blocks[0])
        handle = first.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            self._forward(ids)
        except _HiddenCaptured as captured:
            return captured.hidden
        finally:
            handle.remove()
        raise InputError("the model never called its first block: it cannot be walked block by block")

    def uncalled(self, names: Sequence[str]) -> list[str]:
        """Those of the layers `names` that their block does not call when it runs: it reads their weights.

        Of the blocks that hold layers of the same names the first one is run, and stands for all. An expert to which
        nothing was sent counts as called.
        """
        tried = self._different_blocks(names)
        own = {name for name in names if any(name.startswith(self.blocks[index] + ".") for index in tried)}
        experts = linear_experts(self.model)
        seen = {name for name in own if experts_of(name, experts) is not None}
        length = 0

        def run(index: int) -> Callable[..., Any]:
            forward = self.model.get_submodule(self.blocks[index]).forward

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal length
                hidden, _ = _hidden(args, kwargs)
                if index not in tried:
                    return _passed_on(hidden, length)
                with self.block(index):
                    output = forward(*args, **kwargs)
                length = _tuple_length(output)
                if index == tried[-1]:
                    raise _HiddenCaptured(hidden)
                return output

            return call

        def note(name: str) -> Callable[..., None]:
            return lambda *_: seen.add(name)

        handles = [self.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in own]
        try:
            with torch.no_grad(), self._blocks_replaced(run):
                tokens: int = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
                self._forward(torch.arange(4) % tokens)
        except _HiddenCaptured:
            return [name for name in names if name in own - seen]
        finally:
            for handle in handles:
                handle.remove()
        raise InputError(f"the model never called {self.blocks[tried[-1]]}: it cannot be walked block by block")

    def _different_blocks(self, names: Sequence[str]) -> list[int]:
        """The first block of those whose layers among `names` are called the same, for each such set of names."""
        first: dict[frozenset[str], int] = {}
        for index, block in enumerate(self.blocks):
            own = frozenset(name.removeprefix(block) for name in names if name.startswith(block + "."))
            if own:
                first.setdefault(own, index)
        return [0, *(index for index in first.values() if index)]

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """(1, length, vocabulary) for the hidden states that left the last block; ids are those they came from."""

        def skip(index: int) -> Callable[..., Any]:
            return lambda *_, **__: _passed_on(hidden, self.calls[index].tuple_length)

        with self._blocks_replaced(skip):
            output: Tensor = self._forward(ids).logits
            return output

    def probe(self, ids: Tensor, sites: Sequence[str]) -> dict[str, str]:
        """Learn how blocks are called for ids (length,), and which sites read the same input.

        Runs the whole model once on the first PROBED of them, a block in memory at a time, then on all what calls the
        blocks; on all of it too where blocks hand each other more than hidden states. Returns for every site the first
        site that reads what it reads. InputError where blocks read more of the text than hidden states.
        """
        groups, handed_on = self._run_probed(ids[:PROBED], sites)

        def learn(text: Tensor) -> list[Call]:
            if handed_on:
                self._run_probed(text, [])
            else:
                self._note_calls(text)
            return self.calls

        other, self.calls = learn(ids.flip(0)), learn(ids)
        self._check_same(other)
        return groups | _unrouted([site for site in sites if site not in groups], linear_experts(self.model))

    def _check_same(self, other: list[Call]) -> None:
        """InputError where blocks were called otherwise for another text: then one text's calls are not another's."""
        for block, one, two in zip(self.blocks, self.calls, other, strict=True):
            if not (_same(one.args, two.args) and _same(one.kwargs, two.kwargs)):
                raise InputError(
                    f"{block} reads more of the text than the hidden states of the block before it: "
                    "this architecture cannot be walked block by block"
                )

    def _note_calls(self, ids: Tensor) -> None:
        """Learn how blocks are called for ids, of a model whose blocks are known already and are left out."""
        lengths, noted = [call.tuple_length for call in self.calls], list[Call]()

        def note(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden, key = _hidden(args, kwargs)
                noted.append(_call(args, kwargs, key, lengths[index]))
                if index + 1 == len(self.blocks):
                    raise _HiddenCaptured(hidden)
                return _passed_on(hidden, lengths[index])

            return call

        with self._blocks_replaced(note), suppress(_HiddenCaptured):
            self._forward(ids)
        self.calls = noted
        self._check_calls()

    def _check_calls(self) -> None:
        if len(self.calls) != len(self.blocks):
            raise InputError(
                f"the model called {len(self.calls)} of its {len(self.blocks)} blocks: it cannot be walked"
            )

    def _run_probed(self, ids: Tensor, sites: Sequence[str]) -> tuple[dict[str, str], bool]:
        """Run the whole model on ids, and learn how its blocks are called.

        Returns the sites that were called, as `probe` does, and whether blocks hand each other more than hidden states.
        """
        groups: dict[str, str] = {}
        handed_on = False
        self.calls = []
        first: dict[tuple[Any, ...], str] = {}
        alive: list[Tensor] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0]
                alive.append(x)  # kept, so that no other tensor takes its address
                key = (x.data_ptr(), x.numel(), x.shape[-1], 0 if x.is_inference() else x._version)
                groups[name] = first.setdefault(key, name)

            return hook

        first_output: list[Tensor] = []

        def walk(index: int) -> Callable[..., Any]:
            forward = self.model.get_submodule(self.blocks[index]).forward

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal handed_on
                with self.block(index):
                    output = forward(*args, **kwargs)
                hidden, key = _hidden(args, kwargs)
                if hidden.dim() != 3 or hidden.shape[:2] != (1, len(ids)):
                    raise InputError(
                        f"{self.blocks[index]} reads hidden states of shape {tuple(hidden.shape)} for {len(ids)} "
                        "tokens: this architecture cannot be walked block by block"
                    )
                if first_output and hidden.data_ptr() != first_output[-1].data_ptr():
                    raise InputError(
                        f"{self.blocks[index]} does not read the output of the block before it: "
                        "this architecture cannot be walked block by block"
                    )
                length = _tuple_length(output)
                extras = output[1:] if length else ()
                handed_on |= any(extra is not None for extra in extras)
                handed_on |= any(isinstance(value, dict) for value in kwargs.values())
                self.calls.append(_call(args, kwargs, key, length))
                first_output[:] = [output[0] if length else output]
                alive.clear()
                first.clear()
                return output

            return run

        handles = [self.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in sites]
        try:
            with self._blocks_replaced(walk):
                self._forward(ids)
        finally:
            for handle in handles:
                handle.remove()
        self._check_calls()
        return groups, handed_on

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
        return self.model(input_ids=ids.to(self.device)[None], use_cache=False)


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


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], key: str | None, tuple_length: int) -> Call:
    """A block's call, without the hidden states that came by keyword `key`, or first."""
    rest = {k: v for k, v in kwargs.items() if k != key}
    return Call(args[1:] if key is None else args, rest, key, tuple_length)


def _tuple_length(output: Any) -> int:
    """The length of a block's output where it is a tuple or a list, 0 where it is a tensor."""
    return len(output) if isinstance(output, (tuple, list)) else 0


def _passed_on(hidden: Tensor, tuple_length: int) -> Any:
    """What a block returns that leaves the hidden states as they are."""
    return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden


def _same(one: Any, two: Any) -> bool:
    """Whether all tensors in two arguments of a block, or within their containers, are equal."""
    if torch.is_tensor(one) or torch.is_tensor(two):
        return torch.is_tensor(one) and torch.is_tensor(two) and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return len(one) == len(two) and all(map(_same, one, two))
    return True


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, str | None]:
    """The hidden states of a block's call, and the keyword they came by (None: first positional argument)."""
    if args:
        return args[0], None
    key = "hidden_states" if "hidden_states" in kwargs else next(k for k, v in kwargs.items() if torch.is_tensor(v))
    return kwargs[key], key
