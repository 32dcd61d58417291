"""Weights in llama.cpp's blocks as layers."""

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.formats import build, restored, spec_bytes, stored_tensors
from lrcompress.ggml.rounding import round_weight
from lrcompress.ggml.types import BLOCK_TYPES
from lrcompress.protocols import Spec


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_multiplies_by_the_numbers_of_its_blocks(name, bias):
    kind, draw = BLOCK_TYPES[name], torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 256, generator=draw), torch.randn(2, 3, 256, generator=draw)
    values = torch.randn(7, generator=draw) if bias else None
    spec = Spec("ggml", (7, 256), bias, bias, parameters={"type": name})
    blocks = round_weight(kind, weight)
    stored = {"blocks": blocks} if values is None else {"blocks": blocks, "bias": values}
    layer = restored(spec, stored, torch.float32)
    expected = x @ kind.dense(blocks).T
    torch.testing.assert_close(layer(x), expected if values is None else expected + values)
    torch.testing.assert_close(layer.dense(), kind.dense(blocks))
    assert spec_bytes(spec, 2) == blocks.numel() + (2 * 7 if bias else 0)
    assert stored.keys() | {"weight"} == stored_tensors(spec, torch.float32).keys()
    assert layer.to(torch.bfloat16).touched_bytes(1) == spec_bytes(spec, 2) + 2 * 2 * 7 * 256


@pytest.mark.parametrize(
    ("shape", "parameters", "said"),
    [
        ((4, 256), {}, "type None"),
        ((4, 256), {"type": "Q9_0"}, "Q9_0"),
        ((4, 256), {"type": ["Q4_0"]}, "Q4_0"),
        ((4, 48), {"type": "Q4_0"}, "blocks of 32 inputs"),
        ((4, 64), {"type": "Q4_K"}, "blocks of 256 inputs"),
    ],
)
def test_what_cannot_be_is_refused(shape, parameters, said):
    with pytest.raises(InputError, match=said):
        build(Spec("ggml", shape, parameters=parameters), torch.float32)
