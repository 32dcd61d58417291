"""Published methods, written again here in a few lines each, to compare with at equal bytes: dense weights in, dense out.

Every function takes the weights {name: (out, in)}, what it needs of the calibration text, and the shares of the numbers
that may be stored in all; for each share it yields the weights after compression and the numbers that they cost. Formulas
from the papers (shared design notes, methods.md); nothing is tuned here.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
Compressed = Iterator[tuple[Weights, int]]


@dataclass
class Text:
    """What the methods may ask of the calibration text, per weight: see `gather`."""

    grams: Weights = field(default_factory=dict)
    """(in, in) second moments of the inputs."""
    sizes: Weights = field(default_factory=dict)
    """(in,) mean absolute inputs."""
    gradients: Weights = field(default_factory=dict)
    """(out, in) gradients of the mean next-token loss."""


def gather(model: nn.Module, layers: dict[str, nn.Linear], ids: Tensor, *, gradients: bool) -> Text:
    """Run the model on ids (blocks, length), whole in memory."""
    text, handles = Text(), []
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def hook(name: str) -> Callable:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            text.grams[name] = text.grams.get(name, 0) + (x.T @ x).double()
            text.sizes[name] = text.sizes.get(name, 0) + x.abs().mean(0).double() / len(ids)

        return add

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(hook(name)))
        layer.weight.requires_grad_(gradients)
    for row in ids:
        with torch.set_grad_enabled(gradients):
            loss = nn.functional.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:])
        if gradients:
            (loss / len(ids)).backward()
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        layer.weight.requires_grad_(False)
        if gradients:
            text.gradients[name] = layer.weight.grad.double()
            layer.weight.grad = None
    return text


def cholesky(gram: Tensor) -> Tensor:
    """L with L Lᵀ = G plus as much of the mean eigenvalue as that needs."""
    damping = 0.0
    while True:
        eye = torch.eye(len(gram), dtype=gram.dtype)
        factor, failed = torch.linalg.cholesky_ex(gram + damping * gram.diagonal().mean() * eye)
        if not int(failed):
            return factor
        damping = max(1e-9, 10 * damping)


def whitened(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of W L."""
    return torch.linalg.svd(weight.double() @ factor, full_matrices=False)


def truncated(parts: tuple[Tensor, Tensor, Tensor], factor: Tensor, rank: int) -> Tensor:
    """U_r S_r V_rᵀ L⁻¹."""
    u, s, vt = parts
    right = torch.linalg.solve_triangular(factor, vt[:rank], upper=False, left=False)
    return (u[:, :rank] * s[:rank]) @ right


def uniform_rank(weight: Tensor, kept: float) -> int:
    m, n = weight.shape
    return max(1, int(kept * m * n / (m + n)))


def svd_llm(weights: Weights, text: Text, shares: list[float]) -> Compressed:
    """SVD-LLM (2403.07378): whitening by the inputs' Gram, the same ratio everywhere."""
    factors = {name: cholesky(text.grams[name]) for name in weights}
    parts = {name: whitened(weight, factors[name]) for name, weight in weights.items()}
    for kept in shares:
        ranks = {name: uniform_rank(weight, kept) for name, weight in weights.items()}
        found = {name: truncated(parts[name], factors[name], rank) for name, rank in ranks.items()}
        yield found, sum(rank * sum(weights[name].shape) for name, rank in ranks.items())


def asvd(
    weights: Weights, text: Text, shares: list[float], loss: Callable[[Weights], float], steps: list[float]
) -> Compressed:
    """ASVD (2312.05821): scaling by mean |x|^½, kept ratio per weight by the loss that it alone causes.

    `loss` is the calibration loss with some weights replaced; `steps` are the kept ratios that are tried.
    """
    parts, scales = {}, {}
    for name, weight in weights.items():
        scales[name] = text.sizes[name].clamp_min(1e-8).sqrt()
        parts[name] = torch.linalg.svd(weight.double() * scales[name], full_matrices=False)

    def cut(name: str, share: float) -> Tensor:
        u, s, vt = parts[name]
        rank = uniform_rank(weights[name], share)
        return (u[:, :rank] * s[:rank]) @ (vt[:rank] / scales[name])

    rows = []
    for name, weight in weights.items():
        for share in steps:
            rows.append((loss({name: cut(name, share)}), name, share, uniform_rank(weight, share) * sum(weight.shape)))
    for kept in shares:
        budget = kept * sum(weight.numel() for weight in weights.values())
        chosen = {name: (1.0, weight.numel()) for name, weight in weights.items()}
        for _, name, share, numbers in sorted(rows):  # the largest loss that has to be allowed
            if sum(n for _, n in chosen.values()) <= budget:
                break
            if numbers < chosen[name][1]:
                chosen[name] = (share, numbers)
        found = {n: weights[n].double() if share == 1.0 else cut(n, share) for n, (share, _) in chosen.items()}
        yield found, sum(n for _, n in chosen.values())


def zs_svd(weights: Weights, text: Text, shares: list[float]) -> Compressed:
    """ZS-SVD (2602.02848): whitened components go in the order of the loss that they are predicted to change.

    dL_i = -σ_i u_iᵀ (∂L/∂W L⁻ᵀ) v_i; the sum of the removed ones is kept near zero. A weight whose rank stays above
    break-even remains dense.
    """
    parts, factors, change = {}, {}, {}
    for name, weight in weights.items():
        factors[name] = cholesky(text.grams[name])
        parts[name] = u, s, vt = whitened(weight, factors[name])
        back = torch.linalg.solve_triangular(factors[name], text.gradients[name].T, upper=False).T
        change[name] = (-s * ((u.T @ back) * vt).sum(1)).tolist()
    for kept in shares:
        top = _balanced(weights, change, kept * sum(weight.numel() for weight in weights.values()))
        numbers = {name: min(weights[name].numel(), rank * sum(weights[name].shape)) for name, rank in top.items()}
        found = {}
        for name, weight in weights.items():
            dense = numbers[name] >= weight.numel()
            found[name] = weight.double() if dense else truncated(parts[name], factors[name], top[name])
        yield found, sum(numbers.values())


def _balanced(weights: Weights, change: dict[str, list[float]], budget: float) -> dict[str, int]:
    """Ranks after removing the least component again and again, of the sign that brings the summed change to zero."""
    top = {name: len(changes) for name, changes in change.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    spent, total = sum(sizes.values()), 0.0
    heaps: dict[bool, list] = {True: [], False: []}

    def offer(name: str) -> None:
        value = change[name][top[name] - 1]
        heapq.heappush(heaps[value >= 0], (abs(value), name))

    for name in weights:
        offer(name)
    while spent > budget and (heaps[True] or heaps[False]):
        side = total < 0
        side = side if heaps[side] else not side
        value, name = heapq.heappop(heaps[side])
        total += value if side else -value
        top[name] -= 1
        size = min(weights[name].numel(), top[name] * sum(weights[name].shape))
        spent, sizes[name] = spent + size - sizes[name], size
        if top[name] > 1:
            offer(name)
    return top


def welore(weights: Weights, text: Text | None, shares: list[float]) -> Compressed:
    """WeLore (2407.11239): plain SVD, one threshold on min-max-normalised singular values, found by bisection."""
    parts = {name: torch.linalg.svd(weight.double(), full_matrices=False) for name, weight in weights.items()}

    def ranks(threshold: float) -> dict[str, int]:
        return {
            name: max(1, int(((s - s[-1]) / (s[0] - s[-1]) >= threshold).sum())) for name, (_, s, _) in parts.items()
        }

    def cost(found: dict[str, int]) -> int:
        return sum(min(weights[n].numel(), r * sum(weights[n].shape)) for n, r in found.items())

    for kept in shares:
        budget = kept * sum(weight.numel() for weight in weights.values())
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(ranks(middle)) > budget else (low, middle)
        chosen = ranks(high)
        found = {}
        for name, (u, s, vt) in parts.items():
            r = chosen[name]
            dense = r * sum(weights[name].shape) >= weights[name].numel()
            found[name] = weights[name].double() if dense else (u[:, :r] * s[:r]) @ vt[:r]
        yield found, cost(chosen)


def rocket(
    weights: Weights, text: Text, shares: list[float], steps: list[float], sparsities: list[float]
) -> Compressed:
    """ROCKET (2602.11008), one shot: PCA dictionary of L W, a keep-mask per output, the dictionary fitted again.

    A multiple-choice knapsack over (kept share of `steps`, k / s) per weight minimises the sum of relative errors in weight space,
    solved here by its Lagrangian; the mask costs a sixteenth of a number per entry. No gradient steps.
    """
    choices: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, weight in weights.items():
        rows = [(0.0, float(weight.numel()), 1.0, 1.0)]
        for share in steps:
            for sparsity in sparsities:
                made, numbers = _rocket_weight(weight, text.grams[name], share, sparsity)
                error = float((made - weight.double()).square().sum() / weight.double().square().sum())
                rows.append((error, numbers, share, sparsity))
        choices[name] = rows

    def pick(price: float) -> dict[str, tuple[float, float, float, float]]:
        return {name: min(rows, key=lambda row: row[0] + price * row[1]) for name, rows in choices.items()}

    for kept in shares:
        budget = kept * sum(weight.numel() for weight in weights.values())
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(row[1] for row in pick(middle).values()) > budget else (low, middle)
        found, numbers = {}, 0.0
        for name, (error, cost, share, sparsity) in pick(high).items():
            weight = weights[name]
            made = _rocket_weight(weight, text.grams[name], share, sparsity)[0] if error else weight.double()
            found[name] = made
            numbers += cost
        yield found, int(numbers)


def _rocket_weight(weight: Tensor, gram: Tensor, share: float, sparsity: float) -> tuple[Tensor, float]:
    """The approximation of W (out, in) and the numbers it stores, mask included."""
    m, n = weight.shape
    atoms = min(int(share * m * n / (n + m / sparsity + m / 16)), min(m, n))
    kept = max(1, int(atoms / sparsity))
    factor = cholesky(gram)
    target = factor.T @ weight.double().T  # (in, out): the columns are outputs
    basis = torch.linalg.eigh(target @ target.T).eigenvectors[:, -atoms:]
    codes = basis.T @ target
    back = torch.linalg.solve_triangular(factor.T, basis, upper=True)
    score = codes.abs() * back.norm(dim=0)[:, None].sqrt()  # geometric mean of |v| and |v| ‖L⁻¹ u‖
    mask = torch.zeros_like(codes).scatter_(0, score.topk(kept, dim=0).indices, 1.0)
    sparse = codes * mask
    square = sparse @ sparse.T
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(atoms, dtype=square.dtype)
    basis = torch.linalg.solve(square + ridge, sparse @ target.T).T
    made = torch.linalg.solve_triangular(factor.T, basis @ sparse, upper=True).T
    return made, atoms * n + kept * m + atoms * m / 16
