"""Token losses of one model, or of two on the same blocks with how far their predictions lie apart."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrcompress.model.device import double_device, fast_float32

ROWS = 128
"""Positions whose probabilities are compared at a time: bounds the float64 copies of the logits."""


METRICS = ("token_perplexity", "token_perplexity_stderr", "tokens", "blocks")
"""Of a `tokens:` task; errors where there are two blocks or more."""

METRICS_OF_TWO = ("kl", "kl_stderr", "kl_median", "kl_p90", "kl_floor", "top1", "top1_stderr")
"""Beside them where another model of the same tokens is there."""


@dataclass
class Losses:
    """Mean negative log-likelihood of every block, in nats a token; `scored` tokens a block."""

    scored: int
    blocks: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, float | int]:
        """The perplexity, with its standard error by the delta method over blocks where there are two or more."""
        count = len(self.blocks)
        perplexity = float(torch.tensor(math.fsum(self.blocks) / count, dtype=torch.float64).exp())  # inf, no error
        found: dict[str, float | int] = {"token_perplexity": perplexity}
        if count > 1:
            found["token_perplexity_stderr"] = perplexity * standard_error(self.blocks)
        return {**found, "tokens": count * self.scored, "blocks": count}


@dataclass
class Divergence:
    """Per block: mean KL(reference || model) in nats a token, and the fraction of equal most likely tokens.

    spread: the median and the 90th percentile of that KL over the tokens of all blocks: a mean may be a few tokens'.
    floor: KL(reference || itself) in nats a token, on the first half of the first block, computed with and without the
    other half: what rounding in the computation makes alone.
    """

    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Means over blocks, which are equally long, with their standard errors where there are two or more."""
        found = {}
        for name, values in (("kl", self.kl), ("top1", self.top1)):
            found[name] = math.fsum(values) / len(values)
            if len(values) > 1:
                found[f"{name}_stderr"] = standard_error(values)
            if name == "kl":
                found |= dict(zip(("kl_median", "kl_p90", "kl_floor"), [*self.spread, *self.floor], strict=True))
        return found


def standard_error(values: list[float]) -> float:
    """Of the mean of independent values."""
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))


def token_perplexity(model: Any, blocks: Tensor, tick: Callable[[], None]) -> dict[str, float | int]:
    """The papers' convention: mean negative log-likelihood over blocks x (length - 1) tokens, exponentiated."""
    return score(model, blocks, tick).metrics()


@fast_float32()
@torch.no_grad()
def score(model: Any, blocks: Tensor, tick: Callable[[], None]) -> Losses:
    """A non-finite logit is an ArithmeticError; it is never dropped."""
    found = Losses(blocks.shape[1] - 1)
    for block in blocks:
        found.blocks.append(_loss(_logits(model, block), block))
        tick()
    return found


@fast_float32()
@torch.no_grad()
def score_both(
    model: Any, reference: Any, blocks: Tensor, tick: Callable[[], None]
) -> tuple[Losses, Losses, Divergence]:
    """As `score`, of both; one block's logits of each are in memory at a time."""
    ours, theirs, apart = Losses(blocks.shape[1] - 1), Losses(blocks.shape[1] - 1), Divergence()
    tokens: list[Tensor] = []
    for block in blocks:
        mine, other = _logits(model, block), _logits(reference, block)
        ours.blocks.append(_loss(mine, block))
        theirs.blocks.append(_loss(other, block))
        if not apart.floor:
            again = _logits(reference, block[: max(2, len(block) // 2)])
            apart.floor = [float(torch.cat([_kl(*rows) for rows in _pairs(other[: len(again)], again)]).mean())]
        kl = same = 0.0
        for p, q in _pairs(other, mine):
            each = _kl(p, q)
            tokens.append(each.cpu())
            kl += float(each.sum())
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
        apart.kl.append(kl / len(mine))
        apart.top1.append(same / len(mine))
        tick()
    ordered = torch.cat(tokens).sort().values
    apart.spread = [float(ordered[math.ceil(share * len(ordered)) - 1]) for share in (0.5, 0.9)]
    return ours, theirs, apart


def _pairs(p: Tensor, q: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """ROWS rows of each of the logits (length, vocabulary) at a time."""
    return zip(p.split(ROWS), q.split(ROWS), strict=True)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """(rows,) float64 KL(p || q) of logits (rows, vocabulary), in nats."""
    where = double_device(q.device)
    log_p, log_q = (logits.to(where, torch.float64).log_softmax(-1) for logits in (p, q))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _logits(model: Any, block: Tensor) -> Tensor:
    ids = block.to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits


def _loss(logits: Tensor, block: Tensor) -> float:
    loss = float(torch.nn.functional.cross_entropy(logits, block[1:].to(logits.device)))
    if not math.isfinite(loss):
        raise ArithmeticError("the model puts out non-finite logits")
    return loss
