"""Modules on the meta device draw nothing, and real ones all the same."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrcompress.formats import stored_tensors
from lrcompress.meta import Undrawn, on_meta
from lrcompress.model.experts import linearise
from lrcompress.model.skeleton import empty_model
from lrcompress.protocols import Spec
from tests.architectures import configs


class Calls(TorchDispatchMode):
    """Names of what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_skeleton_and_a_format_draw_nothing():
    with Calls() as calls:
        model = empty_model(configs()["qwen3_moe"])
        linearise(model)
        stored_tensors(Spec("low_rank", (40, 24), parameters={"rank": 3}), torch.float32)
    assert calls.names
    assert not {"uniform_", "normal_", "uniform", "normal", "bernoulli_"} & set(calls.names)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_what_has_numbers_is_drawn():
    torch.manual_seed(0)
    expected = nn.Linear(4, 3).weight
    torch.manual_seed(0)
    with Undrawn():
        assert torch.equal(nn.Linear(4, 3).weight, expected)
    with on_meta():
        assert nn.Linear(4, 3).weight.is_meta
