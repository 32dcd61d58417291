"""How a product is called: whether anything of torch has to see it, and in which dtype."""

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def unseen(x: Tensor) -> bool:
    """Whether nothing watches operators on x: no gradients, no tracing, no mode that counts or records them.

    Then compiled code is called directly; an operator defined in Python costs 10 µs more, as much as a small product.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._is_tracing() or _transformed(x))


def in_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast multiplies in, where it is enabled."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def _transformed(x: Tensor) -> bool:
    """Whether x stands for several tensors or a function's input (torch.func)."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
