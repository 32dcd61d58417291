"""The dense model as a teacher, streamed block by block; what it says of a row is kept in files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.calibration.hidden import HiddenStates
from lrcompress.checkpoint.experts import open_skeleton
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.errors import InputError
from lrcompress.foreign.opening import open_dense
from lrcompress.formats import StoredLinear
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.limits import known_tokens
from lrcompress.model.probing import probe
from lrcompress.model.skeleton import find_blocks
from lrcompress.model.surgery import stored_layers
from lrcompress.training.rows import IGNORED, Rows

CHUNK = 4096
"""Tokens, in whole rows, that go through the dense model together: every one of its blocks is read once for them."""

FEATURE_BLOCKS = 4
"""Blocks whose outputs are compared, evenly spaced, the last one among them."""

PERTURBATION = 0.1
"""How far a compressed weight may move while features are distilled, relative to its norm."""


def open_teacher(
    label: str, device: torch.device, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> BlockWalker:
    """The dense model `label`, computing in `dtype`, its embeddings and head in memory, its blocks in their files."""
    skeleton, reader = open_skeleton(open_dense(label).folder, trust_remote_code=trust_remote_code)
    return BlockWalker(skeleton, reader, device, dtype)


class Teacher:
    """What the dense model makes of `rows`: hidden states, computed for rows when they are first asked for.

    `features` keeps those of several blocks, not of the last one only. Memory holds one block and CHUNK tokens.
    """

    def __init__(self, walker: BlockWalker, rows: Rows, batch: int, scratch: Path, *, features: bool) -> None:
        self._walker, self._rows, self._batch = walker, rows, batch
        check_vocabulary(int(rows.ids.max()) < known_tokens(walker.model))
        with torch.no_grad():
            probe(walker, rows.ids[0], [])
            width = walker.embed(rows.ids[0]).shape[-1]
        count = len(walker.blocks)
        wanted = FEATURE_BLOCKS if features else 1
        self.blocks = sorted({count - 1 - (i * count) // wanted for i in range(wanted)})
        scratch.mkdir(parents=True, exist_ok=True)
        shape = (*rows.ids.shape, width)
        self._files = {b: HiddenStates(scratch / f"block-{b}", shape, walker.dtype) for b in self.blocks}
        self._known: set[int] = set()

    @torch.no_grad()
    def outputs(self, block: int, index: int) -> Tensor:
        """(length, width) hidden states of row `index` after a block of `blocks`."""
        return self._walker.hidden(self._state(block, index))[0]

    def _state(self, block: int, index: int) -> Tensor:
        """All that row `index` carries behind a block of `blocks`."""
        if index not in self._known:
            self._compute(self._due(index))
        return self._files[block].read(index).to(self._walker.device)

    @torch.no_grad()
    def logits(self, index: int, part: slice = slice(None)) -> Tensor:
        """(length, vocabulary) of row `index`, at the positions of `part`."""
        state = self._state(self.blocks[-1], index)
        return self._walker.logits(self._rows.ids[index, part], state[:, part])[0]

    def _due(self, index: int) -> list[int]:
        """Row `index` and those that follow it, at several processes of those batches that come to this one."""
        from accelerate import PartialState

        world = PartialState().num_processes
        turn = (index // self._batch) % world
        after = (i for i in range(index, len(self._rows)) if (i // self._batch) % world == turn)
        return [i for i in after if i not in self._known][: max(1, CHUNK // self._rows.ids.shape[1])]

    def _compute(self, indices: Sequence[int]) -> None:
        walker = self._walker
        states = [walker.embed(self._rows.ids[i]) for i in indices]
        for block in range(len(walker.blocks)):
            with walker.block(block) as module:
                states = [walker.run(block, module, hidden) for hidden in states]
            if block in self._files:
                with disk_errors(self._files[block].path.parent):
                    for i, hidden in zip(indices, states, strict=True):
                        self._files[block].write(i, hidden)
        self._known.update(indices)


def check_vocabulary(same: bool) -> None:
    """InputError where the teacher's vocabulary has shown to be another."""
    if not same:
        raise InputError("the dense model has another vocabulary: name the one that the checkpoint was made from")


def divergence(
    teacher: Teacher, indices: Sequence[int], logits: Tensor, targets: Tensor, part: slice = slice(None)
) -> Tensor:
    """Sum over the positions with a target of KL(dense || model), in nats.

    logits (rows, positions, vocabulary) and targets (rows, positions) are those at `part` of the rows `indices`.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for row, index in enumerate(indices):
        asked = targets[row] != IGNORED
        if bool(asked.any()):
            theirs, ours = teacher.logits(index, part)[: len(asked)][asked], logits[row][asked]
            check_vocabulary(theirs.shape == ours.shape)
            wanted = theirs.float().log_softmax(-1)
            total = total + nn.functional.kl_div(ours.float().log_softmax(-1), wanted, reduction="sum", log_target=True)
    return total


def feature_error(teacher: Teacher, indices: Sequence[int], outputs: dict[int, Tensor], targets: Tensor) -> Tensor:
    """Sum over positions with a target of the relative squared error of the hidden states, a mean over blocks.

    PELA's feature distillation (arXiv 2310.10700); relative to every position's own norm, since first tokens are
    hundreds of times larger than others.
    """
    total = targets.new_zeros((), dtype=torch.float32)
    for block, hidden in outputs.items():
        for row, index in enumerate(indices):
            asked = targets[row] != IGNORED
            wanted = teacher.outputs(block, index)[: len(asked)][asked].float()
            error = (hidden[row][asked].float() - wanted).square().sum(-1) / wanted.square().sum(-1)
            total = total + error.sum()
    return total / len(outputs)


@contextmanager
def captured_outputs(model: nn.Module, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, the hidden states (rows, length, width) after every named block of the last forward pass."""
    found: dict[int, Tensor] = {}
    names = find_blocks(model) if blocks else []

    def keep(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[block] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(names[block]).register_forward_hook(keep(block)) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Bound:
    """Keeps every compressed weight W near the one that training began with: ‖W - W₀‖ ≤ PERTURBATION ‖W₀‖.

    PELA's bound (arXiv 2310.10700) in the compressed form: with ‖D - W₀‖ the compression's own error, W is at most
    so much further from the dense weight D. Weights that share a tensor are pulled back together.
    """

    def __init__(self, model: nn.Module) -> None:
        layers, families = stored_layers(model), dict[str, list[StoredLinear]]()
        for name, layer in layers.items():
            families.setdefault(layer.spec.owner or name, []).append(layer)
        self._families = []
        for family in families.values():
            trained = {id(p): p for layer in family for p in layer.parameters() if p.requires_grad}
            if trained:
                self._families.append((family, [(p, p.detach().clone()) for p in trained.values()]))

    @torch.no_grad()
    def enforce(self) -> None:
        """Move weights that went too far back towards their start, along the way that they came."""
        for family, trained in self._families:
            moved = [p.detach().clone() for p, _ in trained]
            start, half, full = (self._weights(family, trained, moved, share) for share in (0.0, 0.5, 1.0))
            share = min(_largest_share(*each) for each in zip(start, half, full, strict=True))
            self._place(trained, moved, share)

    def _weights(self, family: Any, trained: Any, moved: Any, share: float) -> list[Tensor]:
        self._place(trained, moved, share)
        return [layer.dense() for layer in family]

    def _place(self, trained: Any, moved: Any, share: float) -> None:
        for (parameter, start), end in zip(trained, moved, strict=True):
            parameter.copy_(end if share == 1 else start + share * (end - start))


def _largest_share(start: Tensor, half: Tensor, full: Tensor) -> float:
    """Largest share of the way from `start` to `full` that stays within the bound; `half` is where half of it leads.

    Every format is bilinear in what is trained, so a share s moves the weight by s L + s² Q.
    """
    limit = (PERTURBATION * float(start.norm())) ** 2
    if float((full - start).square().sum()) <= limit:
        return 1.0
    quadratic = 2 * (full - start) - 4 * (half - start)
    linear = full - start - quadratic
    a, b, c = (float(x) for x in (linear.square().sum(), (linear * quadratic).sum(), quadratic.square().sum()))
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        inside = share**2 * (a + 2 * share * b + share**2 * c) <= limit
        low, high = (share, high) if inside else (low, share)
    return low
