"""A loss of the logits that never holds them all: a few positions at a time go through what follows the last block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrcompress.model.calls import passed_on, tuple_length
from lrcompress.model.skeleton import find_blocks

POSITIONS = 128
"""Of all rows together, whose logits are held at a time."""

Loss = Callable[[Tensor, slice], Tensor]
"""Of logits (rows, positions, vocabulary) at some positions of the rows, a sum."""


class Tail:
    """What a model in memory makes of the hidden states that leave its last block."""

    def __init__(self, model: nn.Module) -> None:
        names = find_blocks(model)
        self.model = model
        self._blocks = [model.get_submodule(name) for name in names]
        inside = tuple(f"{name}." for name in names)
        self._trained = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)]
        self._lengths = [0] * len(names)
        self._hidden: Tensor | None = None
        self._head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None

    def run(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The hidden states of ids (rows, length) behind the last block; `model` is the tail's own, or wraps it."""
        with self._watched():
            model(input_ids=ids, use_cache=False)
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        return hidden

    def loss(self, hidden: Tensor, ids: Tensor, of: Loss) -> Tensor:
        """Sum of the loss `of` all logits, with gradients at hidden (rows, length, ...) and at what is trained here."""
        found: Tensor = _Summed.apply(hidden, self, ids, of, *self._trained)  # type: ignore[no-untyped-call]
        return found

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """(rows, length, vocabulary) of hidden states behind the last block; ids are those they came from."""
        for block, length in zip(self._blocks, self._lengths, strict=True):
            block.forward = lambda *_, length=length, **__: passed_on(hidden, length)
        try:
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return found
        finally:
            for block in self._blocks:
                del block.forward

    def parts(self, ids: Tensor, hidden: Tensor) -> list[slice]:
        """Positions that go together; all of them where hidden states do not lie by row and position."""
        rows, length = ids.shape
        count = max(1, POSITIONS // rows) if hidden.shape[:2] == ids.shape else length
        return [slice(start, min(start + count, length)) for start in range(0, length, count)]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def note(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._lengths[index] = tuple_length(output)
                self._hidden = output[0] if self._lengths[index] else output

            return hook

        # Not by logits_to_keep: some models then leave positions out of their last blocks, too.
        handles = [block.register_forward_hook(note(index)) for index, block in enumerate(self._blocks)]
        if self._head is not None:
            handles.append(self._head.register_forward_pre_hook(_last_only))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _last_only(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A head's input, cut: its logits are not used, only had by those who want the model's output."""
    return args[0][:, -1:], *args[1:]


class _Summed(torch.autograd.Function):
    """Gradients are made with the loss, part after part: a part's logits are gone when the next ones are made."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tail: Tail, ids: Tensor, of: Loss, *trained: Tensor) -> Tensor:
        """The loss."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *trained)]
        for part in tail.parts(ids, hidden):
            with torch.enable_grad():
                own = hidden[:, part].detach().requires_grad_(True)
                loss = of(tail.logits(ids[:, part], own), part)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, [own, *trained], allow_unused=True)
                for whole, made in zip([gradients[0][:, part], *gradients[1:]], found, strict=True):
                    if made is not None:
                        whole += made
            total += loss.detach().float()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        """Those that were made, times the outer one."""
        hidden, *trained = (tensor * outer[0].to(tensor.dtype) for tensor in ctx.saved_tensors)
        return hidden, None, None, None, *trained
