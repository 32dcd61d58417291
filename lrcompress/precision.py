"""In which dtype wide sums and decompositions are made: the one switch.

On the CPU, and where float64 is fast, that is float64. A consumer's GPU multiplies at a 32nd or 64th of its rate in
float64, and some devices have none: theirs is float32. What float32 would lose there, running sums keep in a second
part, and vectors and what is done once for a matrix are made in float64 on the CPU: `exact`.
"""

import os
import time
from functools import cache

import torch
from torch import Tensor

from lrcompress.errors import InputError

VARIABLE = "LRCOMPRESS_WIDE"
"""float32 or float64, for tests and measurements: instead of what the device would get."""

SLOW = 0.125
"""A device whose products in float64 have less than this part of the rate in float32 gets float32."""

SIDE, TRIES = 768, 20
"""Of the products that are timed, of which the fastest is believed: others wait for other programs."""


def wide(device: torch.device) -> torch.dtype:
    """The dtype of wide sums and decompositions on `device`; InputError where the environment asks for another."""
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return _best(device)
    if asked not in ("float32", "float64"):
        raise InputError(f"{VARIABLE}={asked} is no dtype of wide sums: set it to float32 or float64, or unset it")
    if asked == "float64" and not has_float64(device):
        raise InputError(f"{VARIABLE}=float64 cannot be had, device {device} has none: unset it")
    return torch.float32 if asked == "float32" else torch.float64


@cache
def _best(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float64
    fast = has_float64(device) and rate(torch.float64, device) >= SLOW * rate(torch.float32, device)
    return torch.float64 if fast else torch.float32


@cache
def has_float64(device: torch.device) -> bool:
    """Whether there are float64 numbers on `device` at all."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).item()
    except (TypeError, RuntimeError):
        return False
    return True


@cache
def rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds a second of a product of SIDE x SIDE, the fastest of some."""
    a, best = torch.ones(SIDE, SIDE, dtype=dtype, device=device), float("inf")
    for _ in range(TRIES):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return SIDE**3 / best


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in its device's wide dtype."""
    return tensor.to(wide(tensor.device))


def exact(tensor: Tensor, rest: Tensor | None = None) -> Tensor:
    """`tensor`, plus what rounding left out of it, in float64: on the CPU where the device's wide dtype is another."""
    if wide(tensor.device) == torch.float64:
        return tensor.double()
    found = tensor.cpu().double()
    return found if rest is None else found + rest.cpu()


def squares(tensor: Tensor) -> Tensor:
    """(...) summed squares of (..., m, n), `exact`: of rows where they lie, of their sums in float64."""
    if wide(tensor.device) == torch.float64:
        return tensor.double().square().sum((-2, -1))
    return exact(tensor.square().sum(-1)).sum(-1)


def split(values: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """float64 values as wide ones on `device`, and what these leave out: None where that is nothing."""
    dtype = wide(device)
    if dtype == torch.float64:
        return values.to(device), None
    values = values.cpu()
    main = values.to(dtype)
    return main.to(device), (values - main).to(dtype).to(device)


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; one of float64 stays on the CPU where the device's wide dtype is another."""
    stays = tensor.dtype == torch.float64 and wide(device) != torch.float64
    return tensor.cpu() if stays else tensor.to(device)
