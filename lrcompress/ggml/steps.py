"""Scales of runs as llama.cpp's block types hold them: float16, powers of two, whole steps; and fitted."""

import torch
from torch import Tensor

from lrcompress.ggml.blocks import BlockType
from lrcompress.ggml.vectors import Weighing
from lrcompress.precision import widened

ROOT = 0.5**0.5

POWERS = 126
"""The largest power of two among scales, and minus the smallest."""


def half(values: Tensor) -> Tensor:
    """values as float16 holds them, in float32."""
    return values.clamp(-65504, 65504).half().float()


def held(kind: BlockType, values: Tensor) -> Tensor:
    """Scales as the type holds them: float16 numbers, or powers of two, by ratio."""
    if not kind.powers:
        return half(values)
    found = torch.frexp(values.abs())
    exponent = found.exponent - (found.mantissa < ROOT).int()
    return torch.ldexp(torch.ones_like(values), torch.where(values == 0, -POWERS, exponent).clamp(-POWERS, POWERS))


def best_steps(values: Tensor, weight: Tensor, ends: tuple[int, int], stride: int = 1) -> tuple[Tensor, Tensor]:
    """d (r,) of float16 and whole steps (r, k) with d * steps near values (r, k), weighted by (k,).

    Steps are ends[0], `stride` more, ... and ends[1].
    """
    low, high = ends
    extreme = values.gather(1, values.abs().argmax(1, keepdim=True))
    sizes = 0.85 + 0.025 * torch.arange(17, device=values.device)
    base = torch.cat([extreme / low, extreme / high], 1) if low < 0 else extreme.clamp_min(0) / high
    d = half((base[:, :, None] * sizes).flatten(1))
    safe = torch.where(d == 0, 1, d)
    steps = torch.where(d[:, :, None] == 0, 0, values[:, None] / safe[:, :, None])
    steps = (low + stride * ((steps - low) / stride).round()).clamp(low, high)
    loss = (weight * (steps * d[:, :, None] - values[:, None]).square()).sum(-1)
    best = loss.argmin(1, keepdim=True)
    return d.gather(1, best)[:, 0], steps.gather(1, best[:, :, None].expand(-1, -1, values.shape[1]))[:, 0]


class Run(Weighing):
    """What a run's errors are weighed by."""

    def refit(self, levels: Tensor, target: Tensor, *, minimum: bool) -> tuple[Tensor, Tensor]:
        """Least-squares scale and offset (rows,) of given levels (rows, b)."""
        weight = widened(self.diagonal)
        a, t = (widened(part @ self.factor) for part in (levels, target))
        aa, at = (weight * a * a).sum(1), (weight * a * t).sum(1)
        alone = torch.where(aa > 0, at / torch.where(aa > 0, aa, 1), 0)
        if not minimum:
            return alone.float(), torch.zeros_like(alone).float()
        one = widened(self.factor.sum(0))
        oo, ao, ot = (weight * one * one).sum(), (weight * a * one).sum(1), (weight * one * t).sum(1)
        det = aa * oo - ao * ao
        fine = det > 1e-6 * aa * oo
        det = torch.where(fine, det, 1)
        scale = torch.where(fine, (at * oo - ot * ao) / det, alone)
        return scale.float(), torch.where(fine, -(aa * ot - ao * at) / det, 0).float()
