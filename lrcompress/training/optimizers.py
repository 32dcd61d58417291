"""Optimisers that see the two factors of a weight together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.linalg.factor_pairs import (
    closest_pivoted_step,
    closest_step,
    nearest_gauge,
    scaled_step,
    unfolded,
)
from lrcompress.training.trainable import Pair, Trainable

BETAS, EPS = (0.9, 0.999), 1e-8

MOMENTUM = "exp_avg"
"""Where an optimiser remembers the mean of gradients: torch's name of it, and ours."""


class PairOptimizer(torch.optim.Optimizer):
    """AdamW without decay; the pairs of `trainable` move as `_move_pair` says, everything else one by one."""

    def __init__(self, trainable: Trainable, lr: float) -> None:
        paired = {id(p) for pair in trainable.pairs for p in (pair.left, pair.right)}
        rest = [p for p in trainable.parameters if id(p) not in paired]
        groups: list[dict[str, Any]] = [{"params": [p.left, p.right], "pivoted": p.pivoted} for p in trainable.pairs]
        groups += [{"params": rest, "pivoted": None}] if rest else []
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; `closure` is not called."""
        for group in self.param_groups:
            params = group["params"]
            if group["pivoted"] is None:
                for parameter in params:
                    if parameter.grad is not None:
                        parameter.sub_(group["lr"] * adam_direction(self.state[parameter], parameter.grad))
            elif all(parameter.grad is not None for parameter in params):
                steps = self._move_pair(Pair(params[0], params[1], group["pivoted"]))
                for parameter, moved in zip(params, steps, strict=True):
                    parameter.sub_(group["lr"] * moved)

    def _move_pair(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Directions of left and right; their gradients are there."""
        raise NotImplementedError


class LoraPro(PairOptimizer):
    """Adam of the weight itself, its step brought back to the factors as the closest one (arXiv 2407.18242).

    The moments are as large as the dense weight. The gradient that they average is the closest step of the factors'
    gradients; what Adam makes of it need not be one that factors can take, so it is projected again.
    """

    def _move_pair(self, pair: Pair) -> tuple[Tensor, Tensor]:
        left, right, left_grad, right_grad = _as_factors(pair)
        left_step, right_step = closest_step(left, right, left_grad, right_grad)
        full = adam_direction(self.state[pair.left], left @ right_step + left_step @ right)
        if pair.pivoted:
            return closest_pivoted_step(pair.left, pair.right, full[len(right) :] @ right.T, left.T @ full)
        return nearest_gauge(left, right, full @ right.T, left.T @ full)


class Scaled(PairOptimizer):
    """Adam of each factor's gradient in the metric of the other (Riemannian preconditioning, arXiv 2402.02347)."""

    def _move_pair(self, pair: Pair) -> tuple[Tensor, Tensor]:
        left_grad, right_grad = _gradients(pair)
        left, right = scaled_step(pair.left, pair.right, left_grad, right_grad, pivoted=pair.pivoted)
        return adam_direction(self.state[pair.left], left), adam_direction(self.state[pair.right], right)


def adam_direction(state: dict[str, Any], gradient: Tensor) -> Tensor:
    """Adam's direction for `gradient`, whose moments `state` keeps: bias-corrected mean over root mean square."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state[MOMENTUM], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    first, second = BETAS
    state[MOMENTUM].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    step = float(state["step"])
    root = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(EPS)
    return (state[MOMENTUM] / (1 - first**step)).div_(root)


def _gradients(pair: Pair) -> tuple[Tensor, Tensor]:
    assert pair.left.grad is not None
    assert pair.right.grad is not None
    return pair.left.grad, pair.right.grad


def _as_factors(pair: Pair) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """left (m, r), right (r, n) and their gradients, a pivoted pair's fixed rows included."""
    left_grad, right_grad = _gradients(pair)
    if pair.pivoted:
        left, left_grad = unfolded(pair.left, pair.right, left_grad, right_grad)
        return left, pair.right, left_grad, right_grad
    return pair.left, pair.right, left_grad, right_grad


def make_optimizer(name: str, trainable: Trainable, lr: float) -> torch.optim.Optimizer:
    """The optimiser of that name; InputError where it needs pairs of factors and none are trained."""
    kind = OPTIMIZERS[name]
    if kind is None:
        return torch.optim.AdamW(trainable.parameters, lr, BETAS, EPS, weight_decay=0.0)
    if not trainable.pairs:
        raise InputError(f"--optimizer {name} moves pairs of factors, and none are trained here: use adamw")
    return kind(trainable, lr)


OPTIMIZERS: dict[str, type[PairOptimizer] | None] = {"adamw": None, "lora-pro": LoraPro, "scaled": Scaled}


def forget_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin anew from where the parameters are; how large gradients are is still known, where they were finite."""
    for state in optimizer.state.values():
        if MOMENTUM in state and all_finite(state["exp_avg_sq"]):
            state[MOMENTUM].zero_()
        else:
            state.clear()


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what the optimiser remembers."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
