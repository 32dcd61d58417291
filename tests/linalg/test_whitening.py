"""Roots of Grams, singular ones included."""

import pytest
import torch

from lrcompress.linalg.whitening import check_gram, damped, symmetric_root, symmetric_root_and_inverse, upper_root


def test_roots_multiply_back():
    x = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x
    root, inverse = symmetric_root_and_inverse(gram)
    torch.testing.assert_close(root @ root, gram)
    torch.testing.assert_close(root @ inverse, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(symmetric_root(gram), root)


def test_a_singular_gram_has_finite_roots():
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    root, inverse = symmetric_root_and_inverse(x.T @ x)
    assert torch.isfinite(inverse).all()
    torch.testing.assert_close(root @ root, x.T @ x, rtol=1e-6, atol=1e-6)


def test_a_zero_gram_gives_identities():
    root, inverse = symmetric_root_and_inverse(torch.zeros(4, 4))
    assert torch.equal(root, torch.eye(4, dtype=torch.float64))
    assert torch.equal(inverse, torch.eye(4, dtype=torch.float64))


def test_damping_is_relative_to_the_trace():
    gram = torch.diag(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(damped(1000 * gram, 0.5), 1000 * damped(gram, 0.5))
    torch.testing.assert_close(damped(gram, 0.5).diagonal(), torch.tensor([2.0, 4.0], dtype=torch.float64))


def test_a_non_finite_gram_is_an_error():
    with pytest.raises(ArithmeticError, match=r"q_proj"):
        check_gram(torch.tensor([[float("inf")]]), "q_proj")


def test_a_wide_gram_of_few_rows_kept_in_float32_has_an_upper_root():
    """Rounding made it indefinite, so that it has no Cholesky factor; a positive definite one keeps Cholesky's."""
    rows = torch.randn(8, 768, generator=torch.Generator().manual_seed(0))
    gram = rows.T @ rows / 8
    gram += 1e-7 * gram.diagonal().mean() * torch.eye(768)
    assert int(torch.linalg.cholesky_ex(gram.double())[1]) > 0
    root = upper_root(gram)
    torch.testing.assert_close(root.T @ root, gram.double(), rtol=0, atol=1e-5 * float(gram.diagonal().max()))
    whole = torch.randn(99, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    root = upper_root(whole.T @ whole)
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ root, whole.T @ whole)
