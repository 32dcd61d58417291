"""CoSpaDi's own solver: batched orthogonal matching pursuit and K-SVD with power iterations (arXiv 2509.22075)."""

import torch
from torch import Tensor

from lrcompress.linalg.dictionary import RIDGES, SparseCode, check_finite, normalised, stalled
from lrcompress.linalg.pursuit import Alternation
from lrcompress.precision import exact, widened

POWER_ITERATIONS = 8
SEED = 42
RIDGE = 1e-9
"""Of the chosen atoms' squares, which are of norm 1."""
PURSUIT_NUMBERS = 2**25
"""Most numbers that the pursuit keeps at once; rows are taken in parts of that size."""


def ksvd(target: Tensor, atoms: int, nonzeros: int, turns: Alternation) -> SparseCode:
    """Y (..., n, p) ≈ C D by rounds of greedy pursuit and atom updates, from random rows of Y as atoms <= n.

    As published, but a row keeps its codes where the greedy pursuit finds worse ones, so no round raises the objective.
    """
    check_finite(target)
    if target.dim() > 2:
        parts = [ksvd(part, atoms, nonzeros, turns) for part in target]
        return SparseCode(
            torch.stack([part.dictionary for part in parts]),
            torch.stack([part.codes for part in parts]),
            torch.stack([part.support for part in parts]),
            [torch.stack(values) for values in zip(*_equally_long(parts), strict=True)],
        )
    chosen = torch.randperm(len(target), generator=torch.Generator().manual_seed(SEED))[:atoms].to(target.device)
    none = target.new_zeros(len(target), 0)
    dictionary, _ = normalised(target[chosen], none.new_zeros(len(target), atoms))
    codes, support = pursue(target, dictionary, nonzeros)
    objectives = [exact(_squared(target - codes @ dictionary)).sum()]
    for _ in range(turns.rounds):
        dictionary, codes = update_atoms(target, dictionary, codes, support)
        fresh, positions = pursue(target, dictionary, nonzeros)
        old = _squared(target - codes @ dictionary)
        better = (_squared(target - fresh @ dictionary) < old)[:, None]
        codes, support = torch.where(better, fresh, codes), torch.where(better, positions, support)
        objectives.append(exact(_squared(target - codes @ dictionary)).sum())
        if stalled(objectives, turns.tolerance):
            break
    return SparseCode(dictionary, codes, support, objectives)


def _equally_long(codes: list[SparseCode]) -> list[list[Tensor]]:
    """Their objectives, those that ended early continued by their last one."""
    longest = max(len(code.objectives) for code in codes)
    return [code.objectives + code.objectives[-1:] * (longest - len(code.objectives)) for code in codes]


def pursue(target: Tensor, dictionary: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of all rows of Y (n, p) at once: codes and support (n, k), `nonzeros` per row.

    Works on D Dᵀ and Y Dᵀ alone: every chosen atom is made orthogonal to those before it by its products with all
    atoms, so that a step costs a row O(s k). Coefficients are solved for exactly at the end.
    """
    gram, products = dictionary @ dictionary.mT, target @ dictionary.mT
    squares = widened(dictionary) @ widened(dictionary).mT
    part = max(1, PURSUIT_NUMBERS // (nonzeros * len(gram)))
    chosen = torch.cat([_pursue_part(gram, piece, nonzeros) for piece in products.split(part)])
    values = torch.cat([
        _solve_on(squares, piece, where)
        for piece, where in zip(products.split(part), chosen.split(part), strict=True)
    ])  # fmt: skip
    codes = torch.zeros_like(products).scatter_(-1, chosen, values)
    return codes, torch.zeros_like(products, dtype=torch.bool).scatter_(-1, chosen, True)


def _pursue_part(gram: Tensor, products: Tensor, nonzeros: int) -> Tensor:
    """(n, nonzeros) atoms chosen for every row of products (n, k)."""
    left = products.clone()
    basis = left.new_zeros(len(left), nonzeros, len(gram))
    chosen = torch.zeros(len(left), nonzeros, dtype=torch.long, device=left.device)
    taken = torch.zeros_like(left, dtype=torch.bool)
    for step in range(nonzeros):
        pick = left.abs().masked_fill(taken, -1.0).argmax(-1, keepdim=True)
        earlier = basis[:, :step]
        overlap = earlier.gather(-1, pick[:, None].expand(-1, step, 1)).mT
        image = gram[pick.squeeze(-1)] - (overlap @ earlier).squeeze(1)
        square = image.gather(-1, pick)
        # An atom in the span of those before it has nothing to add.
        image = torch.where(square > 1e-6, image * square.clamp_min(1e-6).rsqrt(), 0.0)
        basis[:, step] = image
        left.addcmul_(image, left.gather(-1, pick) * square.clamp_min(1e-6).rsqrt(), value=-1)
        chosen[:, step : step + 1] = pick
        taken.scatter_(-1, pick, True)
    return chosen


def _solve_on(gram: Tensor, products: Tensor, chosen: Tensor) -> Tensor:
    """(n, s) least-squares coefficients on the chosen atoms (n, s), from D Dᵀ, wide, and Y Dᵀ."""
    squares = gram[chosen[:, :, None], chosen[:, None, :]]
    ridge = RIDGE if squares.dtype == torch.float64 else RIDGES[squares.dtype]
    factor, failed = torch.linalg.cholesky_ex(squares + ridge * torch.eye(chosen.shape[1]).to(squares))
    if bool(failed.any()):
        raise ArithmeticError("the chosen atoms have no finite normal equations")
    right = widened(products.gather(-1, chosen))[..., None]
    found = torch.cholesky_solve(right, factor)
    if squares.dtype != torch.float64:  # once more, in which the ridge no longer counts
        found = found + torch.cholesky_solve(right - squares @ found, factor)
    return found.squeeze(-1).to(products.dtype)


def update_atoms(target: Tensor, dictionary: Tensor, codes: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """K-SVD: each atom and its coefficients become the leading pair of what the others leave on its rows."""
    dictionary, codes = dictionary.clone(), codes.clone()
    residual = target - codes @ dictionary
    for atom in range(len(dictionary)):
        rows = support[:, atom].nonzero().squeeze(-1)
        share = residual[rows] + torch.outer(codes[rows, atom], dictionary[atom])
        direction = dictionary[atom]
        for _ in range(POWER_ITERATIONS):
            image = share.mT @ (share @ direction)
            norm = image.norm()
            direction = torch.where(norm > 0, image / norm, direction)
        values = share @ direction
        dictionary[atom], codes[rows, atom] = direction, values
        residual[rows] = share - torch.outer(values, direction)
    return dictionary, codes


def _squared(residual: Tensor) -> Tensor:
    """(n,) squared norm of every row."""
    return residual.square().sum(-1)
