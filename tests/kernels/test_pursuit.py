"""Compiled pursuit against that of torch."""

import pytest
import torch

from lrcompress.kernels import pursuit as compiled
from lrcompress.kernels.pursuit import NativePursuit, pursuit_for
from lrcompress.linalg.dictionary import largest, normalised
from lrcompress.linalg.joint import joint_htp
from lrcompress.linalg.pursuit import Alternation, Pursuit, in_torch
from lrcompress.linalg.sparse_coding import htp

needs_compiler = pytest.mark.skipif(pursuit_for(torch.zeros(1, 1)) is Pursuit, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize(("n", "k", "s"), [(1, 1, 1), (5, 7, 7), (40, 33, 1), (300, 130, 50)])
def test_a_step_of_both(n, k, s):
    """From codes of another support, in float64 by torch and in float32 by both: equal supports where scores are not
    within rounding of one another, and codes as near as float32's rounding leaves torch's own."""
    generator = torch.Generator().manual_seed(n)
    target, atoms = (torch.randn(rows, 24, dtype=torch.float64, generator=generator) for rows in (n, k))
    dictionary, _ = normalised(atoms, torch.zeros(1, k).double())
    support = largest(torch.randn(n, k, generator=generator), s)
    codes = torch.randn(n, k, dtype=torch.float64, generator=generator) * support
    found = {}
    for kind, dtype in ((Pursuit, torch.float64), (Pursuit, torch.float32), (NativePursuit, torch.float32)):
        parts = [part.to(dtype) for part in (target, dictionary, codes)]
        found[kind, dtype] = kind(parts[0], s).tried(parts[1] @ parts[1].T, parts[0] @ parts[1].T, parts[2])
    exact, plain, native = found.values()
    assert native[1].dtype == torch.bool
    assert (native[1].sum(-1) == s).all()
    assert not native[2][~native[1]].any()
    same = (exact[1] == native[1]).all(-1) & (exact[1] == plain[1]).all(-1)
    assert same.double().mean() > 0.98
    for at in (0, 2, 3):
        wrong, allowed = ((part[at].double() - exact[at])[same].norm() for part in (native, plain))
        assert wrong <= 4 * allowed + 1e-6 * exact[at].norm(), at


@needs_compiler
def test_equal_scores_leave_every_row_its_number():
    """Zeros, and magnitudes that are all the same."""
    for target in (torch.zeros(3, 20), torch.ones(3, 20)):
        _, support, codes, _ = NativePursuit(target, 4).tried(torch.eye(20), target, torch.zeros(3, 20))
        assert (support.sum(-1) == 4).all()
        assert torch.equal(codes, target * support)


@needs_compiler
def test_whole_solvers_come_as_near():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(200, 64, generator=generator) * torch.logspace(0, -2, 64)
    ways = (in_torch, pursuit_for)
    errors = [float(htp(target, 50, 20, Alternation(12, pursuit=way)).error(target)) for way in ways]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    both, grams = [target[:100], target[100:]], [torch.eye(64), None]
    sums = [float(joint_htp(both, grams, 50, 20, Alternation(6, pursuit=way)).objectives[-1]) for way in ways]
    assert sums[1] == pytest.approx(sums[0], rel=0.01)


def test_whatever_a_solver_pursues_is_pursued_as_asked(monkeypatch):
    """A shared dictionary's first codes, of all weights stacked, as well as those of every weight."""
    asked = []

    def way(target):
        asked.append(tuple(target.shape))
        return Pursuit

    target = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    htp(target, 6, 3, Alternation(2, pursuit=way))
    assert asked == [(30, 8)]
    asked.clear()
    joint_htp([target[:20], target[20:]], [torch.eye(8), None], 6, 3, Alternation(2, pursuit=way))
    assert asked == [(30, 8), (20, 8), (10, 8)]


def test_other_targets_and_machines_without_a_compiler_take_torch(monkeypatch):
    for target in (torch.zeros(1, 1).double(), torch.zeros(1, 1, 1), torch.zeros(1, 1, device="meta")):
        assert pursuit_for(target) is Pursuit
    monkeypatch.setattr(compiled, "library", lambda name: None)
    assert pursuit_for(torch.zeros(1, 1)) is Pursuit
