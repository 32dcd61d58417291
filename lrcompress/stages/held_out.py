"""Held-out text read by the model as it is written."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.budget import bits_per_weight
from lrcompress.calibration.gradients import CHUNK
from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.evaluation.tokens import standard_error
from lrcompress.formats import DENSE, restored
from lrcompress.model.samples import UNSCORED, Sample
from lrcompress.model.surgery import put
from lrcompress.precision import exact
from lrcompress.protocols import Spec
from lrcompress.report.held_out import times_dense, windows_in_words
from lrcompress.report.progress import Reporter
from lrcompress.stages.allocate import Plan
from lrcompress.stages.encode import Encoder
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import HiddenWalk

LOUD_LOSS = 2.0
"""Held-out perplexity above this many times the dense one is worth a warning."""

SHORT = 4
"""Perplexity is told of whole windows, and of the first of so many parts of each: little context, another answer."""

DEFAULT = "auto"
"""The method that is taken where none is named."""


class HeldOutCheck:
    """Walks held-out windows through the model as it is written, and compares with the dense one.

    What is outside of the blocks comes first, and is kept: embeddings are read with it, and logits.
    """

    def __init__(self, opened: Opened, scratch: Path) -> None:
        assert opened.calibration is not None
        self._opened = opened
        self._samples = opened.calibration.unseen
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
            if stored.keys() & {*opened.unread}:
                walker.looks.forget()
            with installed(opened, stored):
                self._hidden = [walker.embed(sample) for sample in self._samples]
            return
        with walker.block(block) as module, installed(opened, stored):
            pairs = zip(self._hidden, self._samples, strict=True)
            self._hidden = [walker.run(block, module, hidden, sample) for hidden, sample in pairs]

    @torch.no_grad()
    def judge(self, plan: Plan, reporter: Reporter) -> dict[str, Any] | None:
        """The `held_out` of report.json, None without windows, or where they reach nothing that is compressed.

        A warning where the compressed model is much worse, or where windows do not reach all of it.
        """
        length = max(map(len, self._samples), default=0)
        contexts = [tokens for tokens in (length, length // SHORT) if any(_scored(s, tokens) for s in self._samples)]
        if not contexts:
            return None
        if self._unread(plan, reporter):
            return None
        lost = self._losses(self._dense)
        with installed(self._opened, self._outside):
            found_lost = self._losses(self._hidden)
        before, after = ([self._perplexity(losses, tokens) for tokens in contexts] for losses in (lost, found_lost))
        (dense, *_), (compressed, *_) = before, after
        error = self._error(lost, found_lost)
        found: dict[str, Any] = {"windows": len(self._samples), "perplexity": compressed, "before": dense}
        found |= {} if error is None else {"ratio_stderr": compressed / dense * error}
        reporter.say(
            f"held-out calibration text ({windows_in_words(found)}): "
            f"perplexity {compressed:.4g}, {self._before} {dense:.4g} (x{times_dense(found)})"
        )
        if not compressed <= LOUD_LOSS * dense:
            reporter.warn(
                f"perplexity on held-out calibration text is {compressed:.4g}, {compressed / dense:.3g} times that of "
                f"the {self._before} model: {self._ways_out(plan)}"
            )
        found["contexts"] = [
            {"tokens": tokens, "perplexity": own, "before": theirs}
            for tokens, own, theirs in zip(contexts, after, before, strict=True)
        ]
        return found

    def _unread(self, plan: Plan, reporter: Reporter) -> bool:
        """Whether the windows reach none of the compressed weights; a warning where they do not reach some."""
        compressed = [name for name, spec in plan.specs.items() if spec.format != DENSE]
        unread = [name for name in compressed if name in {*self._opened.unread}]
        if not unread or any(sample.images for sample in self._samples):
            return False
        reporter.warn(
            f"held-out text says nothing of {len(unread)} of the {len(compressed)} compressed weights, {unread[0]} "
            "first, for it does not reach them: see what the model says of images"
        )
        return len(unread) == len(compressed)

    def _ways_out(self, plan: Plan) -> str:
        """What would help, by what was asked for and what is known."""
        opened, ways = self._opened, list[str]()
        method = opened.request.method
        stored, weights = sum(plan.bytes.values()), sum(site.shape[0] * site.shape[1] for site in opened.sites)
        if not method.needs_statistics and method.base is None:
            ways.append("use a method or a metric that reads text")
        if method.name != DEFAULT:
            ways.append(f"leave --method out, which means {DEFAULT}")
        ways.append(f"keep more than these {bits_per_weight(stored, weights):.2f} bits a weight (--bpw)")
        return "; ".join(ways) + "; or train what is stored with lrcompress heal"

    def _losses(self, states: list[Tensor]) -> list[Tensor]:
        """Nats of every token that a window foretells, 0 of those that do not count."""
        walker, losses = self._opened.walker, []
        for sample, hidden in zip(self._samples, states, strict=True):
            inputs, following = sample.words[:-1].split(CHUNK), sample.labels[1:].split(CHUNK)
            found = []
            for read, part, wanted in zip(inputs, hidden[:, :-1].split(CHUNK, dim=1), following, strict=True):
                logits = walker.logits(read, part.to(walker.device, walker.dtype))[0].float()
                found.append(nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="none").cpu())
            losses.append(exact(torch.cat(found)))
        return losses

    def _perplexity(self, losses: list[Tensor], tokens: int) -> float:
        """Of the first so many tokens of every window."""
        total = sum(float(each[: max(tokens - 1, 0)].sum()) for each in losses)
        return math.exp(min(total / sum(_scored(s, tokens) for s in self._samples), 700.0))

    def _error(self, before: list[Tensor], after: list[Tensor]) -> float | None:
        """Standard error of the mean rise, in nats a token, over the windows; None of less than two.

        Windows differ far more from each other than what compression does to them, so that each is its own measure.
        """
        counts = [_scored(sample, len(sample)) for sample in self._samples]
        rises = [float((b - a).sum()) / n for a, b, n in zip(before, after, counts, strict=True) if n]
        return standard_error(rises) if len(rises) > 1 else None


def _scored(sample: Sample, tokens: int) -> int:
    """How many of a sample's first tokens are foretold: an image's places are not."""
    return int((sample.labels[1 : max(tokens, 1)] != UNSCORED).sum())


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
