"""What kernels/blocks.c does, a strip of rows at a time: where there is no compiler, and to test that against.

Rows of a strip know nothing of each other's errors, so that with strips of one row both find the same.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lrcompress.ggml.blocks import Blocks, BlockType
from lrcompress.ggml.steps import Run, best_steps, half, held
from lrcompress.ggml.vectors import Vectors
from lrcompress.precision import widened

STRIP = 32
"""Rows that are rounded side by side where they are weighed together, and ALONE where each is by itself."""
ALONE = 1024

WIDE = 9
"""Ranges that the first search tries."""

TINY = torch.finfo(torch.float16).tiny


class Weighing(Protocol):
    """See rounding.Metric."""

    gram: Tensor
    factor: Tensor
    diagonal: Tensor
    run_factor: Tensor
    run_diagonal: Tensor
    run_inverse: Tensor
    rows_factor: Tensor | None


def round_in_strips(kind: BlockType, target: Tensor, metric: Weighing, passes: int, strip: int | None = None) -> Blocks:
    """Blocks of target (m, n), row after row."""
    strip = strip or (ALONE if metric.rows_factor is None else STRIP)
    error = torch.zeros_like(target)
    strips = []
    for start in range(0, len(target), strip):
        rows = slice(start, min(start + strip, len(target)))
        wanted = target[rows]
        if metric.rows_factor is not None:
            wanted = wanted - metric.rows_factor[:start, rows].T @ error[:start]
        state = _Strip(kind, wanted, metric)
        state.sweep()
        for _ in range(passes):
            if not state.descend():
                break
        error[rows] = state.numbers() - target[rows]
        strips.append(state.blocks())

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat([part for part in parts if part is not None])

    codes, scale = torch.cat([s.codes for s in strips]), torch.cat([s.scale for s in strips])
    return Blocks(codes, scale, *(joined([getattr(s, k) for s in strips]) for k in ("minimum", "steps", "offsets")))


class _Strip:
    """Rows (r, n) on their way: levels (r, n); scale and offset (r, n / run) as stored, and what they are made of."""

    def __init__(self, kind: BlockType, target: Tensor, metric: Weighing) -> None:
        self.kind, self.target, self.metric = kind, target, metric
        (r, n), make = target.shape, target.new_zeros
        self.per, self.supers, self.runs = kind.block // kind.run, n // kind.block, n // kind.run
        self.levels = torch.zeros_like(target)
        self.vectors: Vectors | None = None
        if kind.book is not None:
            book, levels = kind.book(), torch.tensor(kind.levels, dtype=target.dtype, device=target.device)
            self.vectors = Vectors(book, levels[book.base :])
        self.scale, self.offset = make(r, self.runs), make(r, self.runs)
        self.d, self.dmin = make(r, self.supers), make(r, self.supers)
        self.steps, self.offsets = make(r, self.runs), make(r, self.runs)

    def span(self, run: int) -> slice:
        return slice(run * self.kind.run, (run + 1) * self.kind.run)

    def numbers(self) -> Tensor:
        """(r, n) what is stored."""
        return self.levels * self._spread(self.scale) - self._spread(self.offset)

    def _spread(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.kind.run, 1)

    def nearest(self, steps: Tensor) -> Tensor:
        """The levels nearest to `steps`."""
        levels = torch.tensor(self.kind.levels, dtype=steps.dtype, device=steps.device)
        if self.kind.uniform:
            return steps.round().clamp(levels[0], levels[-1])
        return levels[torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2)]

    def fed_back(self, target: Tensor, scale: Tensor, offset: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """The best of k scales and offsets (r, k) for target (r, b) rounded with feedback: levels (r, b), its place."""
        if self.vectors is not None:
            aim, sizes = target.repeat_interleave(scale.shape[1], 0), scale.flatten()
            found = self.vectors.nearest(aim, sizes, run)
            best = run.loss(found * sizes[:, None] - aim).reshape(scale.shape).argmin(1, keepdim=True)
            found = found.reshape(*scale.shape, -1)
            return found.gather(1, best[..., None].expand(-1, -1, found.shape[-1]))[:, 0], best
        wanted = target.T[:, :, None].expand(-1, *scale.shape).clone()
        levels = torch.empty_like(wanted)
        inverse = torch.where(scale == 0, 0, 1 / torch.where(scale == 0, 1, scale))
        loss = torch.zeros_like(scale)
        for j in range(len(wanted)):
            levels[j] = self.nearest((wanted[j] + offset) * inverse)
            number = levels[j] * scale - offset
            loss += run.diagonal[j] * (number - wanted[j]).square()
            wanted[j + 1 :] -= run.factor[j, j + 1 :, None, None] * (number - target[:, j, None])
        best = loss.argmin(1, keepdim=True)
        return levels.gather(2, best.expand(len(levels), -1, -1))[..., 0].T, best

    def first_scales(self, target: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """A scale and an offset (r,) for target (r, b), from nothing."""
        kind = self.kind
        lowest, highest = kind.levels[0], kind.levels[-1]
        if kind.has_minimum:
            low, high = target.amin(1), target.amax(1)
            if kind.offsets is not None:
                low, high = low.clamp_max(0), high.clamp_min(0)
            middle = torch.zeros_like(low) if kind.offsets is not None else (low + high) / 2
            reach = 0.55 + 0.1 * torch.arange(6, device=target.device)
            pairs = torch.cartesian_prod(reach, reach)
            bottom = middle[:, None] + (low - middle)[:, None] * pairs[:, 0]
            top = middle[:, None] + (high - middle)[:, None] * pairs[:, 1]
            scale, offset = (top - bottom) / (len(kind.levels) - 1), -bottom
        else:
            extreme = target.gather(1, target.abs().argmax(1, keepdim=True))
            extreme = extreme if -lowest > highest else extreme.abs()
            part = torch.arange(WIDE, device=target.device) / (WIDE - 1)
            if -lowest > highest:
                scale = torch.cat([extreme / lowest * (0.6 + 0.5 * part), -extreme / lowest * (0.6 + 0.5 * part)], 1)
            else:
                scale = extreme / highest * (0.6 + (0.45 if kind.book is None else 0.7) * part)
            if self.vectors is not None:  # all of one size: few books have it but for the smallest
                scale = torch.cat([scale, extreme / self.vectors.magnitudes[0]], 1)
            offset = torch.zeros_like(scale)
        scale = torch.where(scale == 0, TINY, scale)
        levels, best = self.fed_back(target, scale, offset, run)
        scale, offset = scale.gather(1, best)[:, 0], offset.gather(1, best)[:, 0]
        fitted, moved = run.refit(levels, target, minimum=kind.has_minimum)
        moved = moved.clamp_min(0) if kind.offsets is not None else moved
        better = _loss(run, levels, fitted, moved, target) < _loss(run, levels, scale, offset, target)
        return torch.where(better, fitted, scale), torch.where(better, moved, offset)

    def sweep(self) -> None:
        """Runs from left to right, errors carried to what follows, scales chosen when their block is reached."""
        metric = self.metric
        error = torch.zeros_like(self.target)

        def local(span: slice) -> tuple[Tensor, Run]:
            carried = error[:, : span.start] @ metric.factor[: span.start, span]
            return self.target[:, span] - carried, Run(metric.factor[span, span], metric.diagonal[span])

        for at in range(self.supers):
            runs = range(at * self.per, (at + 1) * self.per)
            found = [self.first_scales(*local(self.span(run))) for run in runs]
            scale, offset = (torch.stack(part, 1) for part in zip(*found, strict=True))
            weight = torch.stack([metric.diagonal[self.span(run)].sum() for run in runs])
            self._set_block(at, scale, offset, weight)
            for run in runs:
                wanted, weighing = local(self.span(run))
                self.choose(run, wanted, weighing, spread=2, keep=False)
                span = self.span(run)
                number = self.levels[:, span] * self.scale[:, run, None] - self.offset[:, run, None]
                error[:, span] = number - self.target[:, span]

    def _set_block(self, at: int, scale: Tensor, offset: Tensor, weight: Tensor) -> None:
        """The block's scale and steps nearest to scale and offset (r, per) of its runs, weighted by (per,)."""
        runs = slice(at * self.per, (at + 1) * self.per)
        if self.kind.steps is None:
            self.scale[:, at] = held(self.kind, scale[:, 0])
            if self.kind.has_minimum:
                self.offset[:, at] = half(offset[:, 0])
            return
        self.d[:, at], self.steps[:, runs] = best_steps(scale, weight, self.kind.steps, self.kind.stride)
        if self.kind.offsets is not None:
            self.dmin[:, at], self.offsets[:, runs] = best_steps(offset, weight, self.kind.offsets)
        self._derive(at)

    def _derive(self, at: int) -> None:
        runs = slice(at * self.per, (at + 1) * self.per)
        self.scale[:, runs] = self.d[:, at, None] * self.steps[:, runs]
        self.offset[:, runs] = self.dmin[:, at, None] * self.offsets[:, runs]

    def _near(self, run: int, spread: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Scales, offsets, steps and their offsets (r,) beside the present ones of a run."""
        kind, at = self.kind, run // self.per
        for p in range(-spread, spread + 1):
            for q in (-1, 0, 1) if kind.has_minimum else (0,):
                if kind.steps is None:
                    scale = held(kind, self.scale[:, run] * (2.0**p if kind.powers else 1 + 0.06 * p / spread))
                    offset = half(self.offset[:, run] + 0.5 * q * self.scale[:, run])
                    yield scale, offset if kind.has_minimum else torch.zeros_like(offset), scale, offset
                    continue
                step = (self.steps[:, run] + kind.stride * p).clamp(*kind.steps)
                shift = (self.offsets[:, run] + q).clamp(*kind.offsets) if kind.offsets else self.offsets[:, run]
                yield self.d[:, at] * step, self.dmin[:, at] * shift, step, shift

    def choose(self, run: int, target: Tensor, weighing: Run, *, spread: int, keep: bool) -> bool:
        """The best of scales beside the present one for target (r, b); with `keep` only where it is better. Any new?"""
        kind, span, at = self.kind, self.span(run), run // self.per
        near = [torch.stack(part, 1) for part in zip(*self._near(run, spread), strict=True)]
        levels, best = self.fed_back(target, near[0], near[1], weighing)
        scale, offset, step, shift = (part.gather(1, best)[:, 0] for part in near)
        loss = _loss(weighing, levels, scale, offset, target)
        new = torch.ones_like(loss, dtype=torch.bool)
        if keep:
            new = loss < _loss(weighing, self.levels[:, span], self.scale[:, run], self.offset[:, run], target)
        if kind.steps is None:
            fitted, moved = weighing.refit(levels, target, minimum=kind.has_minimum)
            fitted, moved = held(kind, fitted), half(moved)
            better = _loss(weighing, levels, fitted, moved, target) < loss
            scale, offset = torch.where(better, fitted, scale), torch.where(better, moved, offset)
        self.levels[:, span] = torch.where(new[:, None], levels, self.levels[:, span])
        self.scale[:, run] = torch.where(new, scale, self.scale[:, run])
        self.offset[:, run] = torch.where(new, offset, self.offset[:, run])
        if kind.steps is None:
            self.d[:, at], self.dmin[:, at] = self.scale[:, run], self.offset[:, run]
        else:
            self.steps[:, run] = torch.where(new, step, self.steps[:, run])
            self.offsets[:, run] = torch.where(new, shift, self.offsets[:, run])
        return bool(new.any())

    def descend(self) -> bool:
        """A pass of exact descent, every run in turn with all others as they are; whether anything changed."""
        metric, changed = self.metric, False
        moved = (self.numbers() - self.target) @ metric.gram
        for run in range(self.runs):
            span = self.span(run)
            now = self.levels[:, span] * self.scale[:, run, None] - self.offset[:, run, None]
            weighing = Run(metric.run_factor[run], metric.run_diagonal[run])
            if self.choose(run, now - moved[:, span] @ metric.run_inverse[run], weighing, spread=1, keep=True):
                changed = True
                new = self.levels[:, span] * self.scale[:, run, None] - self.offset[:, run, None]
                moved += (new - now) @ metric.gram[span]
        if self.kind.steps is not None:
            for at in range(self.supers):
                changed |= self._refit_block(at, moved)
        return changed

    def _refit_block(self, at: int, moved: Tensor) -> bool:
        """Least-squares scale, then minimum, of a block for given codes and steps; moved (r, n): errors times gram."""
        block, runs = (slice(at * size, (at + 1) * size) for size in (self.kind.block, self.per))
        gram, changed = self.metric.gram, False
        parts = [(self.d, lambda: self.levels[:, block] * self._spread(self.steps[:, runs]))]
        if self.kind.offsets is not None:
            parts.append((self.dmin, lambda: -self._spread(self.offsets[:, runs])))
        for stored, direction_of in parts:
            direction = direction_of()
            slope = widened(moved[:, block] * direction).sum(1)
            curve = widened((direction @ gram[block, block]) * direction).sum(1)
            step = slope / torch.where(curve > 0, curve, 1)
            new = half((stored[:, at] - step).float())
            by = widened(new - stored[:, at])
            good = (curve > 0) & (2 * by * slope + by * by * curve < 0)
            by = torch.where(good, by, 0).float()
            stored[:, at] = torch.where(good, new, stored[:, at])
            moved += (by[:, None] * direction) @ gram[block]
            changed |= bool(good.any())
        self._derive(at)
        return changed

    def blocks(self) -> Blocks:
        """What is to be packed."""
        kind = self.kind
        levels = torch.tensor(kind.levels, dtype=self.levels.dtype, device=self.levels.device)
        codes = torch.searchsorted(levels, self.levels).reshape(-1, kind.block)
        return Blocks(
            codes,
            self.d.reshape(-1),
            self.dmin.reshape(-1) if kind.has_minimum else None,
            self.steps.reshape(-1, self.per).to(torch.int16) if kind.steps else None,
            self.offsets.reshape(-1, self.per).to(torch.int16) if kind.offsets else None,
        )


def _loss(run: Run, levels: Tensor, scale: Tensor, offset: Tensor, target: Tensor) -> Tensor:
    return run.loss(levels * scale[:, None] - offset[:, None] - target)
