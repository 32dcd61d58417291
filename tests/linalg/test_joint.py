"""One dictionary for several weights against the dense normal equations."""

import itertools

import pytest
import torch

from lrcompress.linalg.joint import SharedDictionary, joint_htp
from lrcompress.linalg.pursuit import Alternation
from lrcompress.linalg.sparse_coding import htp
from lrcompress.linalg.whitening import symmetric_root


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(features: int, seed: int, rows: int = 200) -> torch.Tensor:
    x = (
        random(rows, features, seed=seed)
        * torch.logspace(1, -1, features).double()[
            torch.randperm(features, generator=torch.Generator().manual_seed(seed))
        ]
    )
    return x.T @ x / rows


def objective(weights, grams, codes, dictionary) -> float:
    left = [w - c @ dictionary for w, c in zip(weights, codes, strict=True)]
    return float(sum((d @ g * d).sum() for d, g in zip(left, grams, strict=True)))


def problem(count: int = 3, outputs: int = 30, features: int = 16):
    weights = [random(outputs, features, seed=10 + b) for b in range(count)]
    return weights, [gram(features, 20 + b) for b in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_shared_dictionary_solves_its_normal_equations(count):
    weights, grams = problem(count)
    codes = [random(30, 8, seed=b) * (random(30, 8, seed=40 + b) > 0) for b in range(count)]
    found = SharedDictionary(weights, grams).solve(codes, torch.zeros(8, 16).double(), 500)
    # Σ C'C D G = Σ C'W G, with row-major vec(A D G) = (A ⊗ G) vec(D), G symmetric
    system = sum(torch.kron(c.T @ c, g) for c, g in zip(codes, grams, strict=True))
    right = sum(c.T @ w @ g for c, w, g in zip(codes, weights, grams, strict=True))
    exact = torch.linalg.solve(system, right.flatten()).reshape(8, 16)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


def test_no_step_raises_the_objective_and_unused_atoms_stay():
    weights, grams = problem()
    codes = [random(30, 8, seed=b) for b in range(3)]
    for c in codes:
        c[:, 5] = 0
    shared, start, before = SharedDictionary(weights, grams), random(8, 16, seed=9), float("inf")
    for steps in range(12):
        found = shared.solve(codes, start, steps)
        now = objective(weights, grams, codes, found)
        assert now <= before * (1 + 1e-12)
        torch.testing.assert_close(found[5], start[5])
        before = now


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounds_never_raise_the_sum_of_the_weights_own_errors(dtype):
    weights, grams = problem()
    code = joint_htp([w.to(dtype) for w in weights], [g.to(dtype) for g in grams], 10, 4, Alternation(15))
    assert all(bool((s.sum(1) == 4).all()) for s in code.supports)
    assert not any(c[~s].any() for c, s in zip(code.codes, code.supports, strict=True))
    values = [float(o) for o in code.objectives]
    size = objective(weights, grams, [torch.zeros(30, 10).double()] * 3, torch.zeros(10, 16).double())
    assert all(b <= a + (1e-9 if dtype == torch.float64 else 1e-5) * size for a, b in itertools.pairwise(values))
    final = objective(weights, grams, [c.double() for c in code.codes], code.dictionary.double())
    assert final <= values[-1] * (1 + 1e-5)
    assert final < 0.9 * values[0]


def test_one_weight_is_as_near_as_the_solver_of_one():
    """On average: both end at local optima, whose errors scatter by some six per cent, and which of them may turn on
    the last bit of a sum. A geometric mean over eight problems scatters by 0.063 / √8; three of these on either side.
    """
    ratios = []
    for b in range(8):
        weights, grams = [random(60, 24, seed=10 + b)], [gram(24, 20 + b)]
        code, whitened = joint_htp(weights, grams, 20, 8, Alternation(24)), weights[0] @ symmetric_root(grams[0])
        error = objective(weights, grams, code.codes, code.dictionary)
        ratios.append(error / float(htp(whitened, 20, 8, Alternation(24)).error(whitened)))
    assert abs(torch.tensor(ratios).log().mean() - 0.03) < 3 * 0.063 / 8**0.5


def test_own_metrics_are_nearer_than_their_mean():
    """Grams that have little in common: the mean metric is wrong for every weight."""
    weights = [random(40, 24, seed=b) for b in range(2)]
    scales = torch.logspace(1, -1, 24).double()
    grams = [torch.diag(scales**2), torch.diag(scales.flip(0) ** 2)]
    code = joint_htp(weights, grams, 16, 5, Alternation(24))
    mean = (grams[0] + grams[1]) / 2
    stacked = htp(torch.cat(weights) @ symmetric_root(mean), 16, 5, Alternation(24))
    dictionary = stacked.dictionary @ torch.linalg.inv(symmetric_root(mean))
    averaged = objective(weights, grams, stacked.codes.split(40), dictionary)
    assert objective(weights, grams, code.codes, code.dictionary) < 0.9 * averaged


@pytest.mark.parametrize("kind", ["none", "few tokens", "dead inputs", "zero weight", "zero"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_metrics_and_weights(kind, dtype):
    weights, grams = problem(2)
    if kind == "few tokens":
        grams = [gram(16, b, rows=3) for b in range(2)]
    elif kind == "dead inputs":
        for g in grams:
            g[::2] = 0
            g[:, ::2] = 0
    elif kind == "zero weight":
        weights[1] = torch.zeros_like(weights[1])
    elif kind == "zero":
        weights = [torch.zeros_like(w) for w in weights]
    given = [None if kind == "none" else g.to(dtype) for g in grams]
    code = joint_htp([w.to(dtype) for w in weights], given, 10, 4, Alternation(6))
    assert all(torch.isfinite(t).all() for t in (code.dictionary, *code.codes))
    if kind == "few tokens":  # of rank 3: exact, up to what the solver's directions share
        left = objective(weights, grams, [c.double() for c in code.codes], code.dictionary.double())
        none = objective(weights, grams, [torch.zeros(30, 10).double()] * 2, torch.zeros(10, 16).double())
        assert left < 0.02 * none


def test_non_finite_weights_are_refused():
    weights, grams = problem(2)
    weights[1][0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="non-finite"):
        joint_htp(weights, grams, 4, 2, Alternation(2))
