"""The loss that never holds all logits, against the one that does."""

import pytest
import torch

from lrcompress.training import tail as tails
from lrcompress.training.loop import held_out_loss, negative_log_likelihood
from lrcompress.training.rows import IGNORED, Rows
from lrcompress.training.tail import Tail
from tests.checkpoint.test_loading import load


@pytest.mark.parametrize(
    "architecture", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral", "gemma4_small", "deepseek_v4"]
)
def test_loss_and_gradients_are_those_of_all_logits(architecture, make_model, monkeypatch):
    """Of every parameter: within blocks, behind them, and of embeddings that are both the first and the last."""
    monkeypatch.setattr(tails, "POSITIONS", 10)
    model = load(make_model(architecture)).requires_grad_(True)
    ids = torch.randint(2, 300, (2, 13), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, -1] = targets[0, :4] = IGNORED
    whole = negative_log_likelihood(model(input_ids=ids, use_cache=False).logits, targets)
    whole.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    tail, seen = Tail(model), []

    def of(logits: torch.Tensor, part: slice) -> torch.Tensor:
        seen.append(logits.shape[1])
        return negative_log_likelihood(logits, targets[:, part])

    hidden = tail.run(model, ids)
    loss = tail.loss(hidden, ids, of)
    (3 * loss).backward()
    assert seen == [5, 5, 3]
    torch.testing.assert_close(loss.detach(), whole.detach(), rtol=1e-5, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        found = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(
            found, 3 * gradient, rtol=1e-3, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_few_logits_are_asked_for_and_blocks_are_given_back(llama):
    model = load(llama)
    ids = torch.randint(2, 300, (1, 6), generator=torch.Generator().manual_seed(0))
    made = []
    model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape[1]))
    tail = Tail(model)
    hidden = tail.run(model, ids)
    assert made == [1]
    torch.testing.assert_close(tail.logits(ids[:, 2:5], hidden[:, 2:5]), model(input_ids=ids).logits[:, 2:5])


def test_a_held_out_loss_is_measured_again_by_the_same_tail(llama, monkeypatch):
    """As after every few steps of a training: with weights that have changed, and no block looked for again."""
    monkeypatch.setattr(tails, "POSITIONS", 5)
    model = load(llama)
    ids = torch.randint(2, 300, (3, 13), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, -1] = targets[0, :4] = IGNORED
    tail = Tail(model)
    monkeypatch.setattr(tails, "find_blocks", None)
    for _ in range(2):
        with torch.no_grad():
            whole = negative_log_likelihood(model(input_ids=ids[1:]).logits, targets[1:])
            found = held_out_loss(tail, Rows(ids, targets), torch.float32, slice(1, None))
            torch.testing.assert_close(
                found, torch.tensor([float(whole), 24.0], dtype=torch.float64), rtol=1e-5, atol=0
            )
            model.lm_head.weight.mul_(-2)
