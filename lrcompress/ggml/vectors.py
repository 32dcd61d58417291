"""Groups of numbers onto the entries of a codebook: what kernels/blocks_codebook.h does, for many groups at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.ggml.codebooks import SIGNS, Codebook

TURNED = 2
"""Signs of which one is turned round where a number of negative ones must be even, those that cost least."""


@dataclass
class Weighing:
    """What errors of neighbours are weighed by: factor (b, b) unit upper triangular, diagonal (b,)."""

    factor: Tensor
    diagonal: Tensor

    def part(self, start: int, stop: int) -> "Weighing":
        """That of some neighbours by themselves."""
        return Weighing(self.factor[start:stop, start:stop], self.diagonal[start:stop])

    def loss(self, error: Tensor) -> Tensor:
        """(...) of error (..., b)."""
        return ((error @ self.factor).square() * self.diagonal).sum(-1)


class Vectors:
    """A codebook and its magnitudes (base,), ascending."""

    def __init__(self, book: Codebook, magnitudes: Tensor) -> None:
        self.book, self.magnitudes = book, magnitudes
        self.entries = magnitudes[book.entries.to(magnitudes.device).long()]
        self.near = book.near.to(magnitudes.device).long()

    def nearest(self, target: Tensor, scale: Tensor, weighing: Weighing) -> Tensor:
        """Levels (N, b) for target (N, b), scale (N,), eight after eight with feedback."""
        wanted, found = target.clone(), torch.empty_like(target)
        halves = self.book.even and self.book.width < SIGNS
        none = torch.full((len(target),), -1, device=target.device)
        for start in range(0, target.shape[1], SIGNS):
            span, own = slice(start, start + SIGNS), weighing.part(start, start + SIGNS)
            aim = wanted[:, span]
            first = torch.zeros_like(none) if self.book.even and not halves else none
            levels, parity, bent = self._eight(aim, scale, own, first)
            if halves:
                other, _, _ = self._eight(aim, scale, own, 1 - parity)
                losses = [own.loss(part * scale[:, None] - aim) for part in (levels, other)]
                levels = torch.where((bent & (losses[1] < losses[0]))[:, None], other, levels)
            found[:, span] = levels
            error = levels * scale[:, None] - target[:, span]
            wanted[:, start + SIGNS :] -= error @ weighing.factor[span, start + SIGNS :]
        return found

    def _eight(self, target: Tensor, scale: Tensor, weighing: Weighing, odd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels of eight, the parity of the first group's signs, and where a sign of the last was turned for it."""
        wanted, found, width = target.clone(), torch.empty_like(target), self.book.width
        parity = bent = odd
        for start in range(0, SIGNS, width):
            span = slice(start, start + width)
            levels, natural = self._group(wanted[:, span], scale, weighing.part(start, start + width), odd)
            found[:, span] = levels
            bent = (odd >= 0) & (natural != odd)
            if start == 0:
                parity = torch.where(odd < 0, natural, odd)
            odd = parity if self.book.even else odd
            error = levels * scale[:, None] - target[:, span]
            wanted[:, start + width :] -= error @ weighing.factor[span, start + width :]
        return found, parity, bent

    def _group(self, target: Tensor, scale: Tensor, weighing: Weighing, odd: Tensor) -> tuple[Tensor, Tensor]:
        """Levels of a group, odd (N,) of them negative modulo 2 (-1: any), and that parity before signs were turned."""
        signs, places, cost = self._alone(target, scale, weighing, None)
        natural = (signs < 0).sum(1) % 2
        levels, _ = self._near(target, scale, weighing, signs, places)
        wrong = ((odd >= 0) & (natural != odd)).nonzero()[:, 0]
        if len(wrong):
            target, scale, signs = target[wrong], scale[wrong], signs[wrong]
            tries = []
            for turned in cost[wrong].topk(TURNED, largest=False).indices.T[:, :, None]:
                new = signs.scatter(1, turned, -signs.gather(1, turned))
                _, places, _ = self._alone(target, scale, weighing, new)
                tries.append(self._near(target, scale, weighing, new, places))
            (one, first), (two, second) = tries
            levels[wrong] = torch.where((second < first)[:, None], two, one)
        return levels, natural

    def _alone(
        self, target: Tensor, scale: Tensor, weighing: Weighing, signs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each number by itself, with feedback: signs, places, and what turning each sign would add to the loss."""
        wanted, magnitudes = target.clone(), self.magnitudes
        inverse = torch.where(scale == 0, 0, 1 / torch.where(scale == 0, 1, scale))
        found, places, costs = torch.empty_like(target), torch.empty_like(target, dtype=torch.long), []
        for i in range(target.shape[1]):
            x = wanted[:, i] * inverse
            found[:, i] = torch.where(x < 0, -1.0, 1.0) if signs is None else signs[:, i]
            x = x * found[:, i]
            places[:, i] = torch.bucketize(x, (magnitudes[1:] + magnitudes[:-1]) / 2)
            chosen = magnitudes[places[:, i]]
            costs.append(weighing.diagonal[i] * ((x + magnitudes[0]).square() - (x - chosen).square()))
            error = found[:, i] * chosen * scale - target[:, i]
            wanted[:, i + 1 :] -= error[:, None] * weighing.factor[i, i + 1 :]
        return found, places, torch.stack(costs, 1)

    def _near(
        self, target: Tensor, scale: Tensor, weighing: Weighing, signs: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best of the entries near `places`, with signs: levels (N, width) and their loss (N,)."""
        levels = self.entries[self.near[self.book.keys(places)]] * signs[:, None]
        loss, best = weighing.loss(levels * scale[:, None, None] - target[:, None]).min(1)
        return levels[torch.arange(len(levels), device=levels.device), best], loss
