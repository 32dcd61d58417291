"""Sparse dictionaries against oracles: planted ones, torch.linalg.lstsq, and properties that every solver keeps."""

import pytest
import torch

from lrcompress.linalg import sparse_coding
from lrcompress.linalg.dictionary import (
    largest,
    least_squares_codes,
    least_squares_dictionary,
    normalised,
    polar,
    refitted_codes,
)
from lrcompress.linalg.ksvd import pursue, update_atoms
from lrcompress.linalg.pursuit import Alternation, Pursuit
from lrcompress.linalg.sparse_coding import SOLVERS, htp, procrustes

ALL = sorted(SOLVERS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decaying(outputs: int, features: int, seed: int = 0) -> torch.Tensor:
    """A target with the steep spectrum of a whitened weight."""
    return random(outputs, features, seed=seed) * torch.logspace(0, -2, features, dtype=torch.float64)


def planted(outputs: int, features: int, atoms: int, nonzeros: int):
    dictionary, _ = normalised(random(atoms, features, seed=1), torch.zeros(1, atoms, dtype=torch.float64))
    support = largest(random(outputs, atoms, seed=2), nonzeros)
    signs = random(outputs, atoms, seed=3).sign() * (1 + random(outputs, atoms, seed=4).abs())
    return dictionary, signs * support, support


def check(code, target: torch.Tensor, atoms: int, nonzeros: int) -> None:
    """What every solver promises."""
    assert code.dictionary.shape == (*target.shape[:-2], atoms, target.shape[-1])
    assert (code.support.sum(-1) == nonzeros).all()
    assert not code.codes[~code.support].any()
    for tensor in (code.dictionary, code.codes):
        assert torch.isfinite(tensor).all()
        assert tensor.dtype == target.dtype
    energy = target.double().square().sum((-2, -1))
    for earlier, later in zip(code.objectives, code.objectives[1:], strict=False):
        assert (later <= earlier + 1e-9 * energy + 1e-300).all()
    torch.testing.assert_close(
        code.objectives[-1], code.error(target), rtol=1e-6, atol=1e-9 * float(energy.max()) + 1e-300
    )


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize(
    ("shape", "atoms", "nonzeros"),
    [((40, 24), 12, 6), ((24, 40), 12, 6), ((30, 30), 30, 7), ((40, 24), 10, 1), ((40, 24), 8, 8), ((9, 7), 1, 1)],
)
def test_shapes_counts_and_an_objective_that_never_rises(solver, shape, atoms, nonzeros):
    target = decaying(*shape)
    kept = target.clone()
    code = SOLVERS[solver](target, atoms, nonzeros, Alternation(6))
    check(code, target, atoms, nonzeros)
    assert torch.equal(target, kept)
    again = SOLVERS[solver](target, atoms, nonzeros, Alternation(6))
    assert torch.equal(code.codes, again.codes)
    assert torch.equal(code.dictionary, again.dictionary)


@pytest.mark.parametrize("solver", ["htp", "ksvd"])
@pytest.mark.parametrize("nonzeros", [1, 5, 24, 28])
def test_more_atoms_than_features(solver, nonzeros):
    target = random(60, 20)
    code = SOLVERS[solver](target, 30, nonzeros, Alternation(6))
    check(code, target, 30, nonzeros)
    if nonzeros > 1:  # an overcomplete dictionary does no worse than a complete one
        complete = SOLVERS[solver](target, 20, min(nonzeros, 20), Alternation(6))
        assert code.error(target) <= complete.error(target) * 1.05 + 1e-9 * target.square().sum()


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("kind", ["zero", "rank one", "few tokens", "dead outputs", "dead inputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_targets(solver, kind, dtype):
    target = decaying(30, 20)
    if kind == "zero":
        target = torch.zeros_like(target)
    elif kind == "rank one":
        target = torch.outer(target[:, 0], target[0])
    elif kind == "few tokens":
        target = target @ random(20, 3) @ random(3, 20, seed=5)
    elif kind == "dead outputs":
        target[::2] = 0
    else:
        target[:, ::2] = 0
    target = target.to(dtype)
    code = SOLVERS[solver](target, 12, 6, Alternation(4))
    assert (code.support.sum(-1) == 6).all()
    assert torch.isfinite(code.codes).all()
    assert torch.isfinite(code.dictionary).all()
    if kind in ("zero", "rank one", "few tokens"):  # of rank at most s: exactly representable
        share = 1e-9 if dtype == torch.float32 else 1e-17
        if solver == "htp":  # as in test_many_rounds_on_an_exact_target_leave_rounding_alone
            share = max(share, 12 * torch.finfo(dtype).eps / 2)
        if solver == "ksvd":  # s products in this dtype, solved for on dependent atoms: a ridge r passes on 1 / (2 √r)
            share = max(share, (6 * torch.finfo(dtype).eps / 2) ** 2 / (4 * 1e-9))
        assert code.error(target) <= share * target.double().square().sum()


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_targets_are_refused(solver, bad):
    target = random(12, 8)
    target[3, 2] = bad
    with pytest.raises(ArithmeticError, match="non-finite"):
        SOLVERS[solver](target, 4, 2, Alternation(2))


def test_procrustes_keeps_its_dictionary_orthonormal():
    target = decaying(40, 24)
    code = procrustes(target, 12, 6, Alternation(5))
    torch.testing.assert_close(code.dictionary @ code.dictionary.T, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(code.codes, (target @ code.dictionary.T) * code.support)
    u, _, vt = torch.linalg.svd(random(5, 9), full_matrices=False)
    torch.testing.assert_close(polar(random(5, 9)), u @ vt)
    singular = torch.outer(random(5), random(9))
    torch.testing.assert_close(polar(singular) @ polar(singular).T, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (64, 64)])
def test_a_free_dictionary_with_refitted_codes_beats_an_orthonormal_one(shape):
    target = decaying(*shape)
    orthonormal = procrustes(target, 16, 8, Alternation(12)).error(target)
    free = htp(target, 16, 8, Alternation(12))
    assert free.error(target) < 0.95 * orthonormal
    singular_values = torch.linalg.svdvals(target).square()
    assert singular_values[16:].sum() <= free.error(target) <= singular_values[8:].sum()


@pytest.mark.parametrize("shape", [(96, 96), (192, 96), (96, 192)])
def test_more_coefficients_at_first_and_momentum_save_rounds(shape, monkeypatch):
    """Three fifths of the rounds lead as far as all of them without."""
    target = decaying(*shape)
    fast = htp(target, 60, 24, Alternation(15))
    assert (fast.support.sum(-1) == 24).all()
    assert fast.objectives == sorted(fast.objectives, reverse=True)
    monkeypatch.setattr(sparse_coding, "WIDE", 1.0)
    monkeypatch.setattr(sparse_coding, "MOMENTUM", 0.0)
    assert fast.error(target) < 1.002 * htp(target, 60, 24, Alternation(24)).error(target)


def test_what_momentum_makes_worse_is_not_kept(monkeypatch):
    """Pushed far beyond reason, the alternation still descends, and each of two weights is judged alone."""
    monkeypatch.setattr(sparse_coding, "MOMENTUM", 2.0)
    targets = torch.stack([decaying(40, 24), random(40, 24, seed=1)])
    code = htp(targets, 16, 6, Alternation(12))
    check(code, targets, 16, 6)
    stays = torch.stack(code.objectives[:-1]).diff(dim=0) == 0
    assert stays.any(), "momentum of this size never overshot: the test shows nothing"
    assert (code.error(targets) < 0.9 * code.objectives[0]).all()


def test_ksvd_recovers_a_planted_dictionary_up_to_order_and_sign():
    """Nine of ten atoms, as the K-SVD paper finds them in the same experiment."""
    dictionary, codes, _ = planted(1500, 20, 20, 3)
    code = SOLVERS["ksvd"](codes @ dictionary, 20, 3, Alternation(40))
    found = (code.dictionary @ dictionary.T).abs().amax(0)
    assert (found > 0.99).sum() >= 18


@pytest.mark.parametrize("solver", ["htp", "ksvd"])
def test_a_planted_dictionary_is_a_fixed_point(solver):
    """From the true dictionary the supports and codes are found exactly."""
    dictionary, codes, support = planted(100, 32, 16, 3)
    target = codes @ dictionary
    if solver == "ksvd":
        found, where = pursue(target, dictionary, 3)
    else:
        start = largest(target @ dictionary.T, 3)
        found = start * (target @ dictionary.T)
        pursuit, where = Pursuit(target, 3, 20), start
        for _ in range(30):
            step = pursuit.step(dictionary, found, where)
            found, where = step.codes, step.support
    exact = (where == support).all(-1)
    assert exact.double().mean() > 0.9
    torch.testing.assert_close(found[exact], codes[exact], rtol=1e-5, atol=1e-5)


def test_refitted_codes_are_the_least_squares_ones():
    target, dictionary = random(20, 15), random(12, 15, seed=1)
    support = largest(random(20, 12, seed=2), 5)
    gram, products = dictionary @ dictionary.T, target @ dictionary.T
    codes = least_squares_codes(gram, products, support, torch.zeros_like(products), 40)
    for row in range(20):
        atoms = support[row]
        expected = torch.linalg.lstsq(dictionary[atoms].T, target[row]).solution
        torch.testing.assert_close(codes[row, atoms], expected, rtol=1e-8, atol=1e-8)
    assert not codes[~support].any()


def test_the_dictionary_is_the_least_squares_one_in_every_metric():
    target, codes, root = random(30, 10), random(30, 6, seed=1), random(10, 10, seed=2)
    found = least_squares_dictionary(target, codes)
    torch.testing.assert_close(found, torch.linalg.lstsq(codes, target).solution, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found @ root, least_squares_dictionary(target @ root, codes), rtol=1e-8, atol=1e-8)
    codes[:, 2] = 0
    assert not least_squares_dictionary(target, codes)[2].any()
    assert torch.equal(least_squares_dictionary(target, codes, torch.ones(6, 10).double())[2], torch.ones(10).double())


def test_pursuit_is_orthogonal_matching_pursuit():
    target, (dictionary, _) = random(25, 10), normalised(random(14, 10, seed=1), torch.zeros(1, 14).double())
    codes, support = pursue(target, dictionary, 4)
    for row in range(25):
        chosen: list[int] = []
        left = target[row]
        for _ in range(4):
            scores = (dictionary @ left).abs()
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            solution = torch.linalg.lstsq(dictionary[chosen].T, target[row]).solution
            left = target[row] - solution @ dictionary[chosen]
        assert sorted(chosen) == support[row].nonzero().flatten().tolist()
        torch.testing.assert_close(codes[row, chosen], solution, rtol=1e-5, atol=1e-5)


def test_atom_updates_lower_the_error_and_keep_the_support():
    target = decaying(40, 16)
    dictionary, _ = normalised(random(10, 16, seed=1), torch.zeros(1, 10).double())
    codes, support = pursue(target, dictionary, 3)
    new, values = update_atoms(target, dictionary, codes, support)
    assert (target - values @ new).square().sum() < (target - codes @ dictionary).square().sum()
    assert not values[~support].any()
    torch.testing.assert_close(new.norm(dim=1), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("solver", ALL)
def test_weights_of_equal_shape_are_solved_together(solver):
    targets = torch.stack([decaying(20, 12, seed=i) for i in range(3)])
    together = SOLVERS[solver](targets, 8, 4, Alternation(3))
    for i in range(3):
        alone = SOLVERS[solver](targets[i], 8, 4, Alternation(3))
        torch.testing.assert_close(together.error(targets)[i], alone.error(targets[i]))
    check(together, targets, 8, 4)


def test_refitted_codes_are_least_squares_on_their_support():
    target, dictionary = random(30, 20), random(12, 20, seed=1) * torch.logspace(0, 2, 12, dtype=torch.float64)[:, None]
    support = largest(random(30, 12, seed=2), 5)
    start = random(30, 12, seed=3) * support
    codes = refitted_codes(dictionary @ dictionary.T, target @ dictionary.T, start, support)
    for row in range(30):
        chosen = support[row]
        solution = torch.linalg.lstsq(dictionary[chosen].T, target[row]).solution
        torch.testing.assert_close(codes[row, chosen], solution, rtol=1e-7, atol=1e-9)
    assert not codes[~support].any()


@pytest.mark.parametrize("solver", ALL)
def test_alternations_end_where_they_gain_little(solver):
    target = decaying(40, 24)
    every = SOLVERS[solver](target, 12, 5, Alternation(30))
    few = SOLVERS[solver](target, 12, 5, Alternation(30, 0.02))
    assert len(few.objectives) < len(every.objectives)
    assert few.error(target) <= every.objectives[len(few.objectives) - 1] * 1.03
    gains = [1 - float(b / a) for a, b in zip(few.objectives, few.objectives[1:], strict=False)]
    assert min(gains[:-2]) > 0.0
    check(few, target, 12, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dictionary_that_is_exact_stays_exact(dtype):
    """The ridge of the normal equations draws to the dictionary before, so it adds no error, in any round.

    What is left is rounding: with g(m) = m u / (1 - m u) for a sum of m products and B = |C||D|, the right side
    S (CᵀY - CᵀC D), S the scale to a unit diagonal, is wrong by at most (2 g(n) + 2 g(k)) S|C|ᵀB. C passes an error of
    the dictionary on divided by the root of the least eigenvalue of S CᵀC S; Y and the dictionary itself are rounded by
    g(k) B and u B. A ridge that draws to zero costs its share of the dictionary, which is more.
    """
    dictionary, codes, _ = (tensor.to(dtype) for tensor in planted(12, 6, 4, 2))
    target, c, d = codes @ dictionary, codes.double(), dictionary.double()
    u, b, scale = torch.finfo(dtype).eps / 2, c.abs() @ d.abs(), c.norm(dim=0)[:, None].reciprocal()
    sums_of_n, sums_of_k = (m * u / (1 - m * u) for m in codes.shape)
    least = torch.linalg.eigvalsh((c.T * scale) @ (c * scale.T))[0]
    wrong = 2 * (sums_of_n + sums_of_k) * (scale * (c.abs().T @ b)).norm() / least.sqrt()
    bound = wrong + (sums_of_k + u) * b.norm()
    for _ in range(20):
        dictionary = least_squares_dictionary(target, codes, dictionary)
        assert (target.double() - c @ dictionary.double()).norm() <= bound
    drawn_to_zero = least_squares_dictionary(target, codes)
    assert (target.double() - c @ drawn_to_zero.double()).norm() > 1.5 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_rounds_on_an_exact_target_leave_rounding_alone(dtype):
    """A round tells codes apart by their energies, sums of k products each: it takes worse ones by k u of them at most."""
    target = (decaying(30, 20) @ random(20, 3) @ random(3, 20, seed=5)).to(dtype)
    code = SOLVERS["htp"](target, 12, 6, Alternation(20))
    assert code.error(target) <= 12 * torch.finfo(dtype).eps / 2 * target.double().square().sum()
