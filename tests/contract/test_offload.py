"""Every registered format while accelerate keeps its tensors elsewhere between calls."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from tests.contract.test_formats import ALL, dictionary_example, example, loaded

SHAPE = (40, 24)


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.before, self.block, self.after = nn.Linear(8, 24), Block(layer), nn.Linear(40, 8)

    def forward(self, x):
        return self.after(self.block(self.before(x)))


def dispatched(model, folder, place):
    places = {"before": "cpu", **place, "after": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


WAYS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, "cpu"),
    "cpu_offload with buffers": lambda model, folder: cpu_offload(model, "cpu", offload_buffers=True),
    "disk_offload": lambda model, folder: disk_offload(model, folder, "cpu"),
    "disk_offload with buffers": lambda model, folder: disk_offload(model, folder, "cpu", offload_buffers=True),
    "a block on disk": lambda model, folder: dispatched(model, folder, {"block": "disk"}),
    "a layer on disk": lambda model, folder: dispatched(model, folder, {"block.layer": "disk"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_an_offloaded_layer_computes_the_same(name, laid_out, bias, way, tmp_path):
    """With gradients and without, for one row and many, call after call; in between no parameter stays in memory."""
    spec, stored, _, _ = example(name, SHAPE, 5, bias)
    torch.manual_seed(0)
    model = Model(loaded(spec, stored))
    if laid_out:
        model.block.layer.lay_out()
    inputs = [torch.randn(rows, 8) for rows in (1, 64, 1)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    offloaded = WAYS[way](copy.deepcopy(model), str(tmp_path))
    assert all(p.is_meta for p in offloaded.block.parameters())
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            for x, wanted in zip(inputs, expected, strict=True):
                torch.testing.assert_close(offloaded(x), wanted)
    assert all(p.is_meta for p in offloaded.block.parameters())


class Pair(nn.Module):
    """Two layers of one input."""

    def __init__(self, owner, follower):
        super().__init__()
        self.before, self.owner, self.follower = nn.Linear(8, 24), Block(owner), Block(follower)
        self.after = nn.Linear(40, 8)

    def forward(self, x):
        x = self.before(x)
        return self.after(self.owner(x) + self.follower(x))


def sharing(form):
    """A layer and one that follows it, a pair of (module)."""
    owner_spec, stored, _, _ = (
        dictionary_example(SHAPE, 5, False) if form == "sparse_dictionary" else example(form, SHAPE, 5, False)
    )
    owner = loaded(owner_spec, stored)
    name = "sparse_dictionary" if form == "sparse_dictionary" else "low_rank"
    other, tensors, _, _ = example(name, SHAPE, 5, True)
    lent = ("dictionary",) if name == "sparse_dictionary" else ("A.weight",)
    follower = loaded(other.following("owner.layer"), {k: t for k, t in tensors.items() if k not in lent})
    return owner, follower


PAIRS = {
    **{way: make for way, make in WAYS.items() if "on disk" not in way},
    **{
        f"{' and '.join(places)} on disk": lambda model, folder, places=places: dispatched(
            model, folder, {part: "disk" if part in places else "cpu" for part in ("owner", "follower")}
        )
        for places in (("owner",), ("follower",), ("owner", "follower"))
    },
    "layers on disk": lambda model, folder: dispatched(
        model, folder, {"owner.layer": "disk", "follower.layer": "disk"}
    ),
}


@pytest.mark.parametrize("way", PAIRS)
@pytest.mark.parametrize("form", ["low_rank", "pivoted", "sparse_dictionary"])
def test_what_is_shared_comes_from_an_offloaded_owner(form, way, tmp_path):
    owner, follower = sharing(form)
    model = Pair(owner, follower)
    follower.follow(owner)
    inputs = [torch.randn(rows, 8, generator=torch.Generator().manual_seed(0)) for rows in (1, 64, 1)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    offloaded = PAIRS[way](copy.deepcopy(model), str(tmp_path))
    assert any(p.is_meta for p in offloaded.parameters())
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            for x, wanted in zip(inputs, expected, strict=True):
                torch.testing.assert_close(offloaded(x), wanted)
