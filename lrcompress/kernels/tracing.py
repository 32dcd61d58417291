"""How a product is called: whether anything of torch has to see it, and in which dtype."""

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def unseen(*tensors: Tensor | None) -> bool:
    """Whether nothing watches operators on the tensors, all plain ones of the CPU.

    That is without gradients, tracing, and modes that count, record or place them. Then compiled code is called
    directly; an operator defined in Python costs 10 µs more, as much as a small product.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    return all(map(plain, tensors))


def plain(tensor: Tensor | None) -> bool:
    """Whether its numbers lie in memory of the CPU; not of a subclass, nor of torch.func, which stand for others."""
    if tensor is None:
        return True
    own = type(tensor) in _PLAIN and tensor.device.type == "cpu"
    return own and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def in_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast multiplies in, where it is enabled; never of float64, which autocast leaves."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def check_width(x: Tensor, width: int) -> None:
    """RuntimeError, as of torch's own products, unless x is (..., width): compiled code would read beyond it."""
    if x.dim() == 0 or x.shape[-1] != width:
        raise RuntimeError(f"an input of shape {tuple(x.shape)} cannot be multiplied by a weight with {width} inputs")


def check_devices(x: Tensor, weight: Tensor) -> None:
    """RuntimeError, as of torch's own products, unless both lie on one device."""
    if x.device != weight.device:
        raise RuntimeError(
            f"an input on {x.device} cannot be multiplied by a weight on {weight.device}: move one of them"
        )
