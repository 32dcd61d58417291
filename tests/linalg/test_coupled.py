"""Sparse dictionaries in a full Gram of the outputs."""

import pytest
import torch

from lrcompress.linalg.coupled import _refitted, coupled_htp
from lrcompress.linalg.dictionary import SparseCode
from lrcompress.linalg.pursuit import Alternation
from lrcompress.linalg.sparse_coding import htp
from lrcompress.linalg.truncation import decompose
from lrcompress.linalg.whitening import damped


def problem(rows: int = 60, width: int = 24, decay: float = -1.5):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(rows, width, generator=generator) * torch.logspace(0, -1, width)
    gradients = torch.randn(200, rows, generator=generator) @ torch.randn(rows, rows, generator=generator)
    gradients = gradients * torch.logspace(0, decay, rows)
    outputs = damped(gradients.T @ gradients / 200, 0.01)
    return target, (outputs / outputs.diagonal().mean()).float()


def weighted(outputs, target, code) -> float:
    error = (target - code.codes @ code.dictionary).double()
    return float(torch.trace(error.T @ outputs.double() @ error))


def start(target, outputs, atoms=20, nonzeros=6):
    roots = outputs.diagonal().sqrt()[:, None]
    code = htp(roots * target, atoms, nonzeros, Alternation(24))
    return SparseCode(code.dictionary, code.codes / roots, code.support)


def test_every_round_lowers_the_weighted_error_that_it_reports():
    target, outputs = problem()
    begin = start(target, outputs)
    code = coupled_htp(target, outputs, begin, 6, 8)
    assert code.support.sum(1).unique().tolist() == [6]
    assert not code.codes[~code.support].any()
    values = torch.stack(code.objectives)
    assert (values.diff() <= 0).all()
    assert float(values[-1]) == pytest.approx(weighted(outputs, target, code), rel=1e-3)
    assert float(values[0]) < 0.9 * weighted(outputs, target, begin)
    assert float(values[-1]) < 0.9 * float(values[0])
    bound = float(decompose(target, None, outputs).errors()[20])
    assert float(values[-1]) >= 0.999 * bound


def test_a_diagonal_gram_leaves_little_to_gain():
    target, outputs = problem()
    diagonal = torch.diag(outputs.diagonal())
    begin = start(target, diagonal)
    code = coupled_htp(target, diagonal, begin, 6, 4)
    assert 0.8 <= weighted(diagonal, target, code) / weighted(diagonal, target, begin) <= 1.0001


def test_codes_are_the_least_squares_ones_on_their_support(monkeypatch):
    """Against the normal equations of all nonzeros at once, solved densely."""
    monkeypatch.setattr("lrcompress.linalg.coupled.REFIT_STEPS", 400)
    target, outputs = (t.double() for t in problem(12, 10, -0.3))
    begin = start(target.float(), outputs.float(), 8, 3)
    code = SparseCode(begin.dictionary.double(), begin.codes.double(), begin.support)
    found = _refitted(target, outputs, code, code.support)
    where = code.support.flatten()
    gram = torch.kron(outputs, code.dictionary @ code.dictionary.T)[where][:, where]
    right = (outputs @ target @ code.dictionary.T).flatten()[where]
    expected = torch.zeros(12 * 8, dtype=torch.float64)
    expected[where] = torch.linalg.solve(gram, right)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=1e-8)


def test_an_indefinite_gram_of_few_rows_lowers_the_error_all_the_same():
    """In float32 and wider than its rows are many, as the gradients' Gram of little text without damping."""
    generator = torch.Generator().manual_seed(0)
    target, few = torch.randn(256, 24, generator=generator), torch.randn(6, 256, generator=generator)
    outputs = few.T @ few / 6
    outputs = outputs / outputs.diagonal().mean() + 1e-7 * torch.eye(256)
    assert float(torch.linalg.eigvalsh(outputs.double())[0]) < 0
    begin = start(target, outputs)
    code = coupled_htp(target, outputs, begin, 6, 4)
    assert torch.isfinite(code.codes).all()
    assert float(code.objectives[-1]) < 0.5 * weighted(outputs, target, begin)


def test_an_output_without_gradient_hinders_no_other():
    target, outputs = problem()
    outputs[7], outputs[:, 7] = 0.0, 0.0
    kept = torch.arange(len(target)) != 7
    begin = start(target, outputs + torch.diag_embed((~kept).float()))
    without = SparseCode(begin.dictionary, begin.codes[kept], begin.support[kept])
    alone = coupled_htp(target[kept], outputs[kept][:, kept], without, 6, 6)
    code = coupled_htp(target, outputs, begin, 6, 6)
    assert torch.isfinite(code.codes).all()
    assert code.objectives[-1] < 0.995 * code.objectives[0]
    assert float(code.objectives[-1]) == pytest.approx(float(alone.objectives[-1]), rel=1e-3)
