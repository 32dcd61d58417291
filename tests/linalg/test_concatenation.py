"""Joint truncation, its bounds and its estimator against dense stacks."""

import pytest
import torch

from lrcompress.linalg.concatenation import bounds, estimate, joint
from lrcompress.linalg.truncation import decompose

N = 24
SHAPES = [(30, N), (10, N), (14, N)]


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(seed):
    x = random(seed, 100, N) * torch.logspace(0, -2, N, dtype=torch.float64)
    return x.T @ x / 100


@pytest.fixture(params=[0.0, 0.5, 1.0])
def weights(request):
    """From nothing in common to (nearly) one row space."""
    shared = random(9, 6, N)
    return [
        request.param * random(i, m, 6) @ shared + (1.01 - request.param) * random(10 + i, m, n)
        for i, (m, n) in enumerate(SHAPES)
    ]


def true_errors(weights, metric):
    """Squared error of the best rank 0..N of the whitened stack, from its singular values."""
    root = torch.linalg.cholesky(metric) if metric is not None else torch.eye(N, dtype=torch.float64)
    values = torch.linalg.svdvals(torch.cat(weights) @ root) ** 2
    return torch.stack([values[r:].sum() for r in range(N + 1)])


@pytest.mark.parametrize("metric", [None, gram(3)], ids=["plain", "gram"])
def test_bounds_and_estimator_enclose_the_true_error(weights, metric):
    truth = true_errors(weights, metric)
    spectra = [decompose(weight, metric) for weight in weights]
    energies = [spectrum.energies for spectrum in spectra]
    slack = 1e-9 * truth[0]
    lower, upper = bounds(energies, N)
    assert (lower <= truth + slack).all()
    assert (truth <= upper + slack).all()
    assert lower[0] == pytest.approx(float(truth[0]))
    widths = []
    for keep in (3, 8, 14, N):
        low, high = estimate([s.right for s in spectra], energies, metric, keep, N)
        assert (low <= truth + slack).all()
        assert (truth <= high + slack).all()
        assert (high - low <= high[0] - low[0] + slack).all()
        widths.append(float(high[5] - low[5]))
    assert widths == sorted(widths, reverse=True)
    torch.testing.assert_close(low, truth, rtol=1e-6, atol=float(slack))
    torch.testing.assert_close(high, truth, rtol=1e-6, atol=float(slack))


@pytest.mark.parametrize("metric", [None, gram(3)], ids=["plain", "gram"])
def test_in_one_metric_the_joint_truncation_is_the_best_of_the_stack(weights, metric):
    spectra = [decompose(weight, metric) for weight in weights]
    found = joint([s.right for s in spectra], [metric] * 3)
    truth = true_errors(weights, metric)
    total = torch.stack(found.errors).sum(0)
    torch.testing.assert_close(total, truth[: len(total)], rtol=1e-6, atol=1e-8 * float(truth[0]))
    for b, (weight, spectrum) in enumerate(zip(weights, spectra, strict=True)):
        near = spectrum.left @ found.left(b, 7) @ found.right[:7]
        error = weight - near
        squared = (error * (error if metric is None else error @ metric)).sum()
        assert float(squared) == pytest.approx(float(found.errors[b][7]), rel=1e-6, abs=1e-8 * float(truth[0]))


def test_in_metrics_of_their_own_every_left_factor_is_least_squares(weights):
    metrics = [gram(3), gram(4), gram(5) + 0.1 * torch.eye(N, dtype=torch.float64)]
    spectra = [decompose(weight, metric) for weight, metric in zip(weights, metrics, strict=True)]
    found = joint([s.right for s in spectra], metrics)
    for b, (weight, metric) in enumerate(zip(weights, metrics, strict=True)):
        for rank in (1, 6, 15):
            root = torch.linalg.cholesky(metric)
            basis = found.right[:rank] @ root
            best = torch.linalg.lstsq(basis.T, (weight @ root).T).solution.T
            torch.testing.assert_close(spectra[b].left @ found.left(b, rank), best, rtol=1e-3, atol=1e-5)
            squared = float((weight @ root - best @ basis).square().sum())
            assert float(found.errors[b][rank]) == pytest.approx(
                squared, rel=1e-5, abs=1e-8 * float(found.errors[b][0])
            )
        assert found.errors[b][6] >= decompose(weight, metric).errors()[6] * (1 - 1e-9)


def test_a_stack_of_low_rank_has_no_more_components():
    shared = random(9, 4, N)
    spectra = [decompose(random(i, 12, 4) @ shared) for i in range(2)]
    found = joint([s.right for s in spectra], [None, None])
    assert len(found.right) == 4
    assert float(sum(errors[4] for errors in found.errors)) < 1e-9 * float(sum(errors[0] for errors in found.errors))


@pytest.mark.parametrize(("outlier", "promised"), [(100, True), (1e4, False)])
def test_singular_metrics_of_half_the_precision(outlier, promised):
    """Few inputs, one of them huge, summed in float32: errors are no smaller than promised, or nothing is promised."""
    metrics = []
    for i in range(2):
        x = random(20 + i, 9, 60) * torch.logspace(0, -3, 60, dtype=torch.float64)
        x[0] *= outlier
        metrics.append((x.T @ x).float())
    weights = [random(30 + i, 40, 60) for i in range(2)]
    spectra = [decompose(weight, metric.double()) for weight, metric in zip(weights, metrics, strict=True)]
    if not promised:
        with pytest.raises(ArithmeticError, match="positive semidefinite"):
            joint([s.right for s in spectra], metrics)
        return
    found = joint([s.right for s in spectra], metrics)
    for b, (weight, metric) in enumerate(zip(weights, metrics, strict=True)):
        assert found.errors[b].isfinite().all()
        for rank in (1, min(5, len(found.right)), len(found.right)):
            error = weight - spectra[b].left @ found.left(b, rank) @ found.right[:rank]
            squared = float((error @ metric.double() * error).sum())
            assert squared <= float(found.errors[b][rank]) + 1e-6 * float(found.errors[b][0])
