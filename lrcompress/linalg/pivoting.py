"""Choosing rows that span the others."""

import torch
from torch import Tensor

from lrcompress.precision import widened

LARGEST = 1.5
"""Coefficients that are larger change their row for a pivot."""


def pivot_rows(basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `basis` (m, r), r < m, that span all of them, and the coefficients of the others.

    Returns pivots (r,) and others (m - r,), both ascending, and C (m - r, r) with basis[others] = C basis[pivots]
    (PIFA, arXiv 2501.19090). The first pivots are those of an LU decomposition, which no scaling of columns changes;
    then rows are exchanged until no coefficient is larger than LARGEST. Every exchange makes their volume larger by
    the coefficient (maxvol, Goreinov et al. 2010, "How to find a good submatrix").
    """
    m, rank = basis.shape
    compact, swaps = torch.linalg.lu_factor_ex(widened(basis))[:2]
    numbers = list(range(m))
    for place, other in enumerate((swaps - 1).tolist()):  # as LAPACK notes exchanges
        numbers[place], numbers[other] = numbers[other], numbers[place]
    rows = torch.tensor(numbers, device=basis.device)
    top, below = compact[:rank], compact[rank:]
    coefficients = torch.linalg.solve_triangular(top, below, upper=False, left=False, unitriangular=True)
    _exchange(coefficients, rows)
    pivots, places = rows[:rank].sort()
    others, order = rows[rank:].sort()
    return pivots, others, coefficients[order][:, places].to(basis.dtype)


def _exchange(coefficients: Tensor, rows: Tensor) -> None:
    """Exchange pivots with other rows until no coefficient is larger than LARGEST; both arguments change."""
    rank = coefficients.shape[1]
    while True:
        largest = int(coefficients.abs().argmax())
        i, j = divmod(largest, rank)
        value = float(coefficients[i, j])
        if not abs(value) > LARGEST:
            return
        # Every row that had c_j of pivot j has c_j / v of row i now; row i itself is what was pivot j.
        column, row = coefficients[:, j].clone(), coefficients[i].clone()
        column[i] += 1
        row[j] -= 1
        coefficients.addr_(column, row, alpha=-1 / value)
        rows[[j, rank + i]] = rows[[rank + i, j]]
