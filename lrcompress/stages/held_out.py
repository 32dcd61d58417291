"""Held-out text read by the model as it is written."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.calibration.gradients import CHUNK
from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.formats import DENSE, restored
from lrcompress.model.surgery import put
from lrcompress.protocols import Spec
from lrcompress.report.progress import Reporter
from lrcompress.stages.allocate import Plan
from lrcompress.stages.encode import Encoder
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import HiddenWalk

LOUD_LOSS = 5.0
"""Held-out perplexity above this many times the dense one is worth a warning."""


class HeldOutCheck:
    """Walks held-out windows through the model as it is written, and compares with the dense one.

    What is outside of the blocks comes first, and is kept: embeddings are read with it, and logits.
    """

    def __init__(self, opened: Opened, scratch: Path) -> None:
        assert opened.calibration is not None
        self._opened = opened
        self._ids = opened.calibration.held_out
        self._before = "less compressed" if isinstance(opened.reader, Multiplied) else "dense"
        self._dense = HiddenWalk(opened, scratch / "hidden").held_out(len(opened.blocks))
        self._outside: dict[str, tuple[Spec, dict[str, Tensor]]] = {}
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def step(self, block: int, encoder: Encoder, plan: Plan) -> None:
        """Run the windows through one compressed block, or through what comes before all of them."""
        walker, opened = self._opened.walker, self._opened
        beside = opened.embeddings if block == len(opened.blocks) else []
        compressed = [s for s in [*beside, *opened.sites_of(block)] if plan.specs[s.name].format != DENSE]
        stored = {s.name: (plan.specs[s.name], encoder(s.name)) for s in compressed}
        if block == len(opened.blocks):
            self._outside = stored
            with installed(opened, stored):
                self._hidden = [walker.embed(ids) for ids in self._ids]
            return
        with walker.block(block) as module, installed(opened, stored):
            self._hidden = [walker.run(block, module, hidden) for hidden in self._hidden]

    @torch.no_grad()
    def judge(self, reporter: Reporter) -> None:
        """Warn where the compressed model is far worse."""
        if not len(self._ids):
            return
        dense = self._perplexity(self._dense)
        with installed(self._opened, self._outside):
            compressed = self._perplexity(self._hidden)
        reporter.say(
            f"held-out calibration text ({len(self._ids)} windows): "
            f"perplexity {compressed:.4g}, {self._before} {dense:.4g} (x{compressed / dense:.2f})"
        )
        if not compressed <= LOUD_LOSS * dense:
            reporter.warn(
                f"perplexity on held-out calibration text is {compressed:.4g}, {compressed / dense:.3g} times "
                f"that of the {self._before} model: this checkpoint is probably useless; ask for a smaller ratio, "
                "another method, or an activation-aware metric"
            )

    def _perplexity(self, states: list[Tensor]) -> float:
        walker = self._opened.walker
        total = count = 0.0
        for ids, hidden in zip(self._ids, states, strict=True):
            inputs, following = ids[:-1].split(CHUNK), ids[1:].split(CHUNK)
            for read, part, wanted in zip(inputs, hidden[:, :-1].split(CHUNK, dim=1), following, strict=True):
                logits = walker.logits(read, part.to(walker.device, walker.dtype))[0].float()
                total += float(nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum"))
            count += len(ids) - 1
        return math.exp(min(total / count, 700.0))


@contextmanager
def installed(opened: Opened, stored: dict[str, tuple[Spec, dict[str, Tensor]]]) -> Iterator[None]:
    """While open, the loaded model has the named layers in their stored formats, given as spec and tensors.

    A head that follows embeddings is among them.
    """
    walker = opened.walker
    followed = {site.name: [site.head] for site in opened.embeddings if site.head is not None}
    changed = [other for name in stored for other in (name, *followed.get(name, ()))]
    originals = {name: walker.model.get_submodule(name) for name in changed}
    try:
        for name, (spec, tensors) in stored.items():
            put(walker.model, name, restored(spec, tensors, walker.dtype, walker.device), followed.get(name, ()))
        yield
    finally:
        for name, original in originals.items():
            walker.model.set_submodule(name, original)
