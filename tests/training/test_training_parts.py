"""Parts of the training, each against an independent computation."""

import math

import pytest
import torch
from torch import nn

from lrcompress.formats import restored
from lrcompress.training import distill
from lrcompress.training.distill import Bound, Teacher, divergence, feature_error, open_teacher
from lrcompress.training.optimizers import BETAS, EPS, LoraPro, Scaled, forget_momentum, make_optimizer
from lrcompress.training.rows import Rows
from lrcompress.training.schedule import LAST_RATE, evaluations_at, rate_at
from lrcompress.training.trainable import Pair, Trainable
from tests.checkpoint.test_loading import load
from tests.contract.test_formats import ALL, example


class Factors(nn.Module):
    """A weight (m, n) of two factors, pivoted or not, as a model of its own."""

    def __init__(self, m, n, r, pivoted):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.left = nn.Parameter(torch.randn(m - r * pivoted, r, generator=generator))
        self.right = nn.Parameter(torch.randn(r, n, generator=generator))
        self.pivoted = pivoted

    def whole(self):
        return torch.cat([torch.eye(self.right.shape[0]), self.left]) if self.pivoted else self.left

    def forward(self):
        return self.whole() @ self.right


def tangent(left, right, full):
    """Nearest to `full` of what moves of both factors can make: a projection, written out in float64."""
    left, right, full = left.double(), right.double(), full.double()
    rows = left @ torch.linalg.pinv(left)
    columns = torch.linalg.pinv(right) @ right
    return rows @ full + (torch.eye(len(rows)).double() - rows) @ full @ columns


@pytest.mark.parametrize("pivoted", [False, True])
def test_lora_pro_moves_the_weight_as_adam_of_the_projected_gradient(pivoted):
    model = Factors(9, 7, 3, pivoted)
    trainable = Trainable(model, pairs=[Pair(model.left, model.right, pivoted)])
    optimizer = LoraPro(trainable, 1e-4)
    target = torch.randn(9, 7, generator=torch.Generator().manual_seed(1))
    mean = square = torch.zeros(9, 7).double()
    for step in range(1, 4):
        optimizer.zero_grad()
        weight = model()
        weight.retain_grad()
        (weight - target).square().sum().backward()
        left, right, before = model.whole().detach().clone(), model.right.detach().clone(), weight.detach().double()
        gradient = tangent(left, right, weight.grad)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        direction = mean / (1 - BETAS[0] ** step) / ((square / (1 - BETAS[1] ** step)).sqrt() + EPS)
        optimizer.step()
        moved = (before - model().detach().double()) / 1e-4
        torch.testing.assert_close(moved, tangent(left, right, direction), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [LoraPro, Scaled])
@pytest.mark.parametrize("pivoted", [False, True])
def test_optimisers_of_pairs_reach_a_minimum(kind, pivoted):
    model = Factors(9, 7, 3, pivoted)
    with torch.no_grad():
        target = Factors(9, 7, 3, pivoted)() + 0.3 * torch.randn(9, 7, generator=torch.Generator().manual_seed(2))
    optimizer = kind(Trainable(model, pairs=[Pair(model.left, model.right, pivoted)]), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model() - target).square().sum()
        loss.backward()
        optimizer.step()
    best = torch.linalg.svdvals(target)[3:].square().sum()
    assert 0.999 * best <= loss.item() <= 1.1 * best


def test_what_is_in_no_pair_moves_as_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(5, generator=generator), torch.randn(4, 5, generator=generator)
    model = Factors(4, 4, 2, False)
    model.extra = nn.Parameter(start.clone())
    ours = Scaled(Trainable(model, pairs=[Pair(model.left, model.right, False)]), 1e-2)
    reference = nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([reference], 1e-2, BETAS, EPS, weight_decay=0.0)
    for gradient in gradients:
        model.extra.grad, reference.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(model.extra, reference)


def test_the_state_of_an_optimiser_of_pairs_survives_saving():
    model = Factors(6, 5, 2, False)
    trainable = Trainable(model, pairs=[Pair(model.left, model.right, False)])
    optimizer = make_optimizer("lora-pro", trainable, 1e-3)
    model().square().sum().backward()
    optimizer.step()
    again = make_optimizer("lora-pro", trainable, 1e-3)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[model.left]["exp_avg_sq"], optimizer.state[model.left]["exp_avg_sq"])
    assert again.state[model.left]["exp_avg"].shape == (6, 5)


class Layer(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.layer = module


@pytest.mark.parametrize(
    "name", ["low_rank", "pivoted", "sum 16 of quantized", "sparse_dictionary", "transposed_dictionary"]
)
@pytest.mark.parametrize("far", [False, True])
def test_the_bound_pulls_back_weights_that_went_too_far_and_only_these(name, far):
    spec, stored, _, _ = example(name, (24, 40), 5, False)
    model = Layer(restored(spec, stored, torch.float32))
    for parameter in model.layer.factor_names():
        model.layer.get_parameter(parameter).requires_grad_(True)
    start = model.layer.dense().detach().clone()
    bound = Bound(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.5 if far else 0.003) * torch.randn(parameter.shape, generator=generator)
    moved = model.layer.dense().detach().clone()
    bound.enforce()
    share = float((model.layer.dense().detach() - start).norm() / start.norm())
    if far:
        assert share == pytest.approx(distill.PERTURBATION, rel=1e-3)
    else:
        assert share < distill.PERTURBATION
        assert torch.equal(model.layer.dense().detach(), moved)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_every_format_are_those_of_the_loss(name):
    """Central differences in float64 along a random direction of what is trained."""
    spec, stored, _, _ = example(name, (24, 40), 5, True)
    module = restored(spec, stored, torch.float64)
    trained = [module.get_parameter(key).requires_grad_(True) for key in module.factor_names()]
    assert all(not key.endswith("scale") for key in module.factor_names())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in trained]

    def loss(shift):
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter += shift * direction
        return module(x).tanh().sum()

    loss(0.0).backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True))
    step = 1e-5
    with torch.no_grad():
        up, down = float(loss(step)), float(loss(-2 * step))
    assert slope == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_every_format_computes_in_bfloat16_around_float32_factors(name):
    spec, stored, weight, bias = example(name, (24, 40), 5, True)
    module = restored(spec, stored, torch.bfloat16)
    trained = [module.get_parameter(key) for key in module.factor_names()]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        with torch.no_grad():
            again = module(x)
    torch.testing.assert_close(y.float(), x @ weight.T + bias, rtol=0.05, atol=0.05 * float(weight.norm(dim=1).max()))
    # Without gradients other kernels multiply: both round to bfloat16, not at the same places.
    assert again.dtype == y.dtype
    torch.testing.assert_close(again, y.detach(), rtol=2**-6, atol=2**-8 * float(y.detach().abs().max()))
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)


def test_the_learning_rate_rises_then_falls():
    rates = [rate_at(fraction / 100) for fraction in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 5
    assert rates[0] == rates[-1] == pytest.approx(LAST_RATE)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rate_at(3.0) == pytest.approx(LAST_RATE)


@pytest.fixture
def rows():
    return Rows.of_blocks(torch.randint(2, 300, (5, 16), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_teacher_says_what_the_whole_dense_model_says(architecture, make_model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 2 * rows.ids.shape[1])
    folder = make_model(architecture)
    teacher = Teacher(open_teacher(str(folder), torch.device("cpu")), rows, 2, tmp_path, features=True)
    with torch.no_grad():
        whole = load(folder)(input_ids=rows.ids, output_hidden_states=True)
    assert teacher.blocks == [0, 1, 2]
    for index in (3, 0, 4, 1):
        torch.testing.assert_close(teacher.logits(index), whole.logits[index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(teacher.outputs(0, index), whole.hidden_states[1][index], rtol=1e-4, atol=1e-4)


def test_a_mixture_of_experts_teaches_too(make_model, rows, tmp_path):
    folder = make_model("mixtral")
    teacher = Teacher(open_teacher(str(folder), torch.device("cpu")), rows, 2, tmp_path, features=False)
    with torch.no_grad():
        whole = load(folder)(input_ids=rows.ids).logits
    for index in range(len(rows)):
        torch.testing.assert_close(teacher.logits(index), whole[index], rtol=1e-4, atol=1e-4)


def test_distillation_losses_by_hand(llama, rows, tmp_path):
    teacher = Teacher(open_teacher(str(llama), torch.device("cpu")), rows, 2, tmp_path, features=True)
    dense = load(llama)
    with torch.no_grad():
        whole = dense(input_ids=rows.ids, output_hidden_states=True)
    same = divergence(teacher, range(5), whole.logits, rows.targets)
    assert float(same) == pytest.approx(0.0, abs=1e-3)
    other = torch.randn(whole.logits.shape, generator=torch.Generator().manual_seed(1))
    p, q = whole.logits[:, :-1].double().log_softmax(-1), other[:, :-1].double().log_softmax(-1)
    wanted = float((p.exp() * (p - q)).sum())
    assert float(divergence(teacher, range(5), other, rows.targets)) == pytest.approx(wanted, rel=1e-4)
    states = {block: 1.1 * whole.hidden_states[block + 1] for block in (0, 1)}
    error = float(feature_error(teacher, range(5), states, rows.targets))
    assert error == pytest.approx(5 * 15 * 0.01, rel=1e-3)
    assert math.isfinite(error)


def test_a_training_is_measured_ten_times_and_more_often_at_first():
    found = [evaluations_at(fraction / 1000) for fraction in range(1001)]
    times = [place / 1000 for place in range(1, 1001) if found[place] > found[place - 1]]
    assert times == pytest.approx([1 / 16, 2 / 16, 3 / 16, 4 / 16, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1], abs=1e-3)


@pytest.mark.parametrize("name", ["adamw", "scaled"])
def test_what_was_not_a_number_is_forgotten(name):
    """Gradients and moments of one bad step do not spoil those after training went back."""
    model = Factors(6, 5, 2, False)
    trainable = Trainable(model, pairs=[Pair(model.left, model.right, False)])
    optimizer, start = make_optimizer(name, trainable, 1e-3), model.left.detach().clone()
    for bad in (True, False):
        for parameter in (model.left, model.right):
            parameter.grad = torch.full_like(parameter, torch.nan if bad else 1.0)
        optimizer.step()
        if bad:
            with torch.no_grad():
                model.left.copy_(start)
                model.right.copy_(torch.ones_like(model.right))
            forget_momentum(optimizer)
    assert bool(torch.isfinite(model.left).all())
    assert not torch.equal(model.left, start)
