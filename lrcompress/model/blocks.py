"""Running a model block by block: only one block's weights are in memory at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.model.calls import (
    Call,
    handed_by,
    handing_on,
    hidden_of,
    passed_on,
    tuple_length,
    with_hidden,
)
from lrcompress.model.carried import Handed, Layout, containers, put
from lrcompress.model.device import release_freed
from lrcompress.model.looking import Looks
from lrcompress.model.samples import Sample, sample_of
from lrcompress.model.skeleton import MISFIT, checkpoint_names, find_blocks, language_model, tie_as_stored, tied_names
from lrcompress.protocols import TensorSource

UNWALKABLE = "it cannot be calibrated block by block; --method ecsq --set metric=plain does without"


class UnwalkableError(InputError):
    """The blocks of a model cannot be run one by one: a method that reads no text does without."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: {UNWALKABLE}")


class HiddenCaptured(Exception):
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

    How a block is called is learnt by running the model on real tokens (probing.py), so no architecture is named. Where
    blocks read more than the hidden states of the one before, a sample's state holds everything that it carries
    (`carried.Layout`), and the model itself calls a block, the others left out; otherwise it is the hidden states.
    A sample with images is called as the whole model calls its language model for it (`looks`).
    `untied` names parameters that the config ties to others while the files hold another matrix for each.
    """

    def __init__(self, model: nn.Module, source: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.source, self.device, self.dtype = model, source, device, dtype
        self.blocks = find_blocks(model)
        self.names = checkpoint_names(model, source.names(), source.made())
        _check_shapes(model, self.names, source)
        self._within: dict[str, dict[str, str]] = {block: {} for block in self.blocks}
        depth = self.blocks[0].count(".") + 1
        for name, stored in (self.names | _shared_names(model, self.names)).items():
            self._within.get(".".join(name.split(".", depth)[:depth]), {})[name] = stored
        self.calls: list[Call] = []
        self.layouts: list[Layout] = []
        """What enters each block, and what leaves the last one; empty where that is hidden states alone."""
        self.width = 0
        self.text = language_model(model, self.blocks)
        self.looks = Looks(model.get_submodule(self.blocks[0].rsplit(".", 2)[0]), device)
        self._last = 0
        prefixes = tuple(block + "." for block in self.blocks)
        self._outside = {k: v for k, v in self.names.items() if not k.startswith(prefixes)}
        self._loaded = False
        self.untied: list[str] = []
        if getattr(model, "all_tied_weights_keys", None):
            self._load_resident()

    @property
    def unread(self) -> dict[str, str]:
        """Model name to stored name of what lies outside of the blocks, and is read when the model first runs."""
        return {} if self._loaded else self._outside

    @property
    def bytes_to_come(self) -> int:
        """Of what is `unread`, once it is read."""
        metas = [self.source.meta(stored) for stored in self.unread.values()]
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
    def hollow(self, name: str, names: Iterable[str]) -> Iterator[None]:
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
        tensors = {k[len(name) + 1 :]: v for k, v in self._read(self.names_in(index)).items()}
        following = index + (1 if index >= self._last else -1)
        self._last = index
        if 0 <= following < len(self.blocks):
            self.source.will_read(list(self.names_in(following).values()))
        module.load_state_dict(tensors, assign=True)
        module.requires_grad_(False)
        try:
            yield module
        finally:
            empty = {k: torch.empty_like(v, device="meta") for k, v in tensors.items()}
            module.load_state_dict(empty, assign=True)
            del tensors
            release_freed()

    def names_in(self, index: int) -> dict[str, str]:
        """Model name to stored name of block `index`'s tensors, those of an earlier block that it shares among them."""
        return self._within[self.blocks[index]]

    def run(self, index: int, module: nn.Module, hidden: Tensor, sample: Sample | None = None) -> Tensor:
        """A sample's state (1, length, width) after block `index`, called as the model calls it.

        The `sample` need not be given where it is text alone.
        """
        if self.layouts or (sample is not None and sample.look is not None):
            return self._run_within(index, module, hidden, sample)
        call = self.calls[index]
        if call.hidden_key is None:
            output = module(hidden, *call.args, **call.kwargs)
        else:
            output = module(*call.args, **{call.hidden_key: hidden}, **call.kwargs)
        result: Tensor = output[0] if tuple_length(output) else output
        return result

    def _run_within(self, index: int, module: nn.Module, state: Tensor, sample: Sample | None) -> Tensor:
        """As `run`, by running the whole model with the blocks before left out and those behind not reached."""
        ids, handed = self.layouts[index].unpack(state) if self.layouts else (state, Handed(state))
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
            with self.blocks_replaced(step):
                self.call(Sample(ids) if sample is None or sample.look is None else sample)
        except _Ran as ran:
            if not self.layouts:
                return ran.handed.hidden
            return self.layouts[index + 1].pack(ids, ran.handed, self.width, self.dtype)
        raise UnwalkableError(f"the model never called {self.blocks[index]}")

    def hidden(self, state: Tensor) -> Tensor:
        """The hidden states in a sample's state that left the last block or any that gives as many."""
        return self.layouts[-1].hidden(state) if self.layouts else state

    def embed(self, text: Tensor | Sample, *, whole: bool = False) -> Tensor:
        """The state (1, length, width) of a sample, or of tokens (length,), that enters the first block.

        `whole`: from the tokens on, for gradients, though it be known what images are to the language model.
        """
        sample, found = sample_of(text), list[Handed]()

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(handed_by(hidden_of(args, kwargs)[0], containers(args, kwargs), {}))
            raise HiddenCaptured(found[0].hidden)

        first = self.model.get_submodule(self.blocks[0])
        handle = first.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            self._look(sample) if whole and sample.look is not None else self.call(sample)
        except HiddenCaptured as captured:
            if self.layouts:
                return self.layouts[0].pack(sample.words.to(self.device), found[0], self.width, self.dtype)
            return captured.hidden
        finally:
            handle.remove()
        raise UnwalkableError("the model never called its first block")

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """(1, length, vocabulary) for the state that left the last block; ids are those it came from, or a part."""
        left = self.hidden(hidden)

        def skip(index: int) -> Callable[..., Any]:
            return lambda *_, **__: passed_on(left, self.calls[index].tuple_length)

        with self.blocks_replaced(skip):
            output: Tensor = self.forward(ids).logits
            return output

    @contextmanager
    def blocks_replaced(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """While open, calling block i calls forward(i) instead."""
        modules = [self.model.get_submodule(name) for name in self.blocks]
        for index, module in enumerate(modules):
            module.forward = forward(index)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def forward(self, ids: Tensor) -> Any:
        self._load_resident()
        return self.text(input_ids=ids.to(self.device)[None], use_cache=False)

    def call(self, sample: Sample) -> Any:
        """The language model on a sample."""
        if sample.look is None:
            return self.forward(sample.ids)
        self._load_resident()
        return self.looks.call(sample, lambda: self._look(sample))

    def _look(self, sample: Sample) -> Any:
        """The whole model on a sample with images."""
        assert sample.look is not None
        self._load_resident()
        reads = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in sample.look().items()
        }
        return self.model(**reads, use_cache=False)


def _check_shapes(model: nn.Module, names: dict[str, str], source: TensorSource) -> None:
    """InputError where a stored tensor is not what the config makes of it."""
    for name, expected in model.state_dict().items():
        if name not in names:
            continue
        stored = source.meta(names[name])
        if stored.shape != expected.shape or stored.is_floating_point() != expected.is_floating_point():
            raise InputError(
                f"the checkpoint stores {names[name]} as {tuple(stored.shape)} {stored.dtype}, its config makes it "
                f"{tuple(expected.shape)} {expected.dtype}: {MISFIT}"
            )
