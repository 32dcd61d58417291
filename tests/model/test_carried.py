"""Blocks that read more than hidden states: run one by one they give what the whole model does, gradients too."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.experts import ExpertReader
from lrcompress.errors import InputError
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.carried import Handed, Layout, digits, whole
from lrcompress.model.experts import linearise
from lrcompress.model.probing import probe
from lrcompress.model.skeleton import empty_model, read_config
from tests.architectures import CARRYING

IDS, OTHER = (torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(seed))[0] for seed in (0, 1))


def walker_of(folder):
    model = empty_model(read_config(folder))
    linearise(model)
    return BlockWalker(model, ExpertReader(folder, model), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", CARRYING)
def test_walked_it_is_the_whole_model(make_model, family):
    folder = make_model(family)
    walker, dense = walker_of(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        probe(walker, IDS, [])
        assert walker.layouts
        state = walker.embed(OTHER)
        for index in range(len(walker.blocks)):
            with walker.block(index) as module:
                state = walker.run(index, module, state)
        expected = dense(input_ids=OTHER[None]).logits
        assert (walker.logits(OTHER, state) - expected).abs().max() < 1e-5 * expected.abs().max()
        part = walker.logits(OTHER[8:16], state[:, 8:16])
        assert (part - expected[:, 8:16]).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", CARRYING)
def test_walked_back_its_gradients_are_autograd_s(make_model, family):
    """Those of keys and values that later blocks share come back to the block that made them."""
    folder = make_model(family)
    walker, dense = walker_of(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    loss = nn.functional.cross_entropy
    loss(dense(input_ids=OTHER[None]).logits[0, :-1], OTHER[1:]).backward()
    expected = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None and n.endswith("_proj.weight")}
    states, gradients = [], {}
    with torch.no_grad():
        probe(walker, IDS, [])
        states.append(walker.embed(OTHER))
        for index in range(len(walker.blocks)):
            with walker.block(index) as module:
                states.append(walker.run(index, module, states[-1]))
    last = states[-1].requires_grad_(True)
    loss(walker.logits(OTHER, last)[0, :-1], OTHER[1:]).backward()
    gradient = last.grad
    for index in reversed(range(len(walker.blocks))):
        state = states[index].requires_grad_(True)
        with walker.block(index) as module:
            for name, parameter in module.named_parameters():
                if name.endswith("_proj.weight"):
                    parameter.requires_grad_(True)
                    gradients[f"{walker.blocks[index]}.{name}"] = parameter
            walker.run(index, module, state).backward(gradient)
            gradients |= {n: p.grad for n, p in gradients.items() if isinstance(p, nn.Parameter)}
        gradient = state.grad
    compared = [name for name in expected if gradients.get(name) is not None]
    assert len(compared) >= 2 * len(walker.blocks)
    for name in compared:
        assert (gradients[name] - expected[name]).abs().max() < 1e-4 * expected[name].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whole_numbers_survive_any_dtype(dtype):
    numbers = torch.tensor([[0, 1, -1, 255, 256, 2**31 - 1, -(2**31), 151_935]])
    assert torch.equal(whole(digits(numbers).to(dtype)), numbers)


def test_what_has_no_dimension_of_tokens_cannot_be_hidden_states():
    with pytest.raises(ValueError, match="without a dimension of tokens"):
        Layout(Handed(torch.ones(1, 8, 4)), Handed(torch.ones(1, 8, 4)), (16, 8))
    place = Layout(Handed(torch.ones(1, 16, 4), [torch.ones(3)]), Handed(torch.ones(1, 8, 4), [torch.ones(3)]), (16, 8))
    packed = place.pack(torch.arange(16), Handed(torch.ones(1, 16, 4), [torch.tensor([1.0, 2, 3])]), 20, torch.float32)
    assert packed.shape == (1, 16, 20)
    ids, handed = place.unpack(packed)
    assert torch.equal(ids, torch.arange(16))
    assert torch.equal(handed.extras[0], torch.tensor([1.0, 2, 3]))


def test_a_walk_that_is_not_the_model_is_refused(make_model, monkeypatch):
    """As where a block reads what it was never handed; here the text comes to it the other way round."""
    walker, unpack = walker_of(make_model("gemma4_small")), Layout.unpack

    def turned(self, state):
        ids, handed = unpack(self, state)
        return ids.flip(0), handed

    monkeypatch.setattr(Layout, "unpack", turned)
    with pytest.raises(InputError, match="do not give what the whole model does"), torch.no_grad():
        probe(walker, IDS, [])
