"""Low-rank weights that share their right factor, from the artefacts that the low-rank methods leave."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrcompress.formats.pivoted import Pivoted
from lrcompress.linalg.concatenation import Joint, joint
from lrcompress.linalg.pivoting import pivot_rows
from lrcompress.protocols import Spec

Artefacts = Sequence[dict[str, Tensor]]


def joined(artefacts: Artefacts) -> Joint:
    """The joint truncation of the weights, each counted as its method weighs it."""
    return joint(weighed(artefacts), [artefact.get("gram") for artefact in artefacts])


def weighed(artefacts: Artefacts) -> list[Tensor]:
    """Right factors (k, in), float64, whose squared lengths in the metric of the inputs are the energies."""
    return [artefact["right"].double() * scale for artefact, scale in zip(artefacts, _scales(artefacts), strict=True)]


def encode_joined(
    specs: Sequence[Spec], artefacts: Artefacts, biases: Sequence[Tensor | None]
) -> list[dict[str, Tensor]]:
    """Stored tensors of weights at one rank, the owner of the right factor, `low_rank` or `pivoted`, first."""
    found, rank = joined(artefacts), specs[0].rank
    pivoted = specs[0].format == Pivoted.name
    count = min(rank, found.spanned(0) if pivoted else len(found.right))
    right = found.right[:count]
    lefts = [
        artefact["left"].double() @ found.left(b, count) / scale
        for b, (artefact, scale) in enumerate(zip(artefacts, _scales(artefacts), strict=True))
    ]
    moved = [
        _moved(artefact, left @ right, bias) for artefact, left, bias in zip(artefacts, lefts, biases, strict=True)
    ]
    missing = rank - count  # no component is left for these
    if pivoted:
        return _by_pivots(lefts, right, missing, moved)
    return _by_factors(lefts, right, missing, moved)


def _moved(artefact: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias of `weight` (out, in), which carries what the mean input gives where the metric is centred."""
    if "mean" not in artefact:
        return bias
    moved = artefact["mean_output"] - weight @ artefact["mean"]
    return (moved if bias is None else bias.double() + moved).float()


def _by_factors(
    lefts: list[Tensor], right: Tensor, missing: int, biases: Sequence[Tensor | None]
) -> list[dict[str, Tensor]]:
    """All of them `low_rank`, with `missing` components of zeros."""
    lefts, right = [pad(left, (0, missing)) for left in lefts], pad(right, (0, 0, 0, missing))
    # One scale a component for all, so that no factor leaves the range of half precision.
    sizes = torch.cat(lefts).norm(dim=0)
    real = (sizes > 0) & (right.norm(dim=1) > 0)
    balance = torch.where(real, (right.norm(dim=1) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)).sqrt(), 1.0)
    stored = [
        _with_bias({"B.weight": (left * balance).float()}, bias) for left, bias in zip(lefts, biases, strict=True)
    ]
    stored[0]["A.weight"] = (right / balance[:, None]).float()
    return stored


def _by_pivots(
    lefts: list[Tensor], right: Tensor, missing: int, biases: Sequence[Tensor | None]
) -> list[dict[str, Tensor]]:
    """The first one `pivoted`, its pivot rows the right factor of the others, `missing` of them used by none."""
    owner, *others = lefts
    rows = torch.arange(len(owner), device=owner.device)
    pivots, rest, coefficients = pivot_rows(owner) if owner.shape[1] else (rows[:0], rows, owner)
    order, unused = torch.cat([pivots, rest]), (0, missing)
    kept = owner[order[: len(pivots) + missing]] @ right
    stored = [Pivoted.stored(order, kept, pad(coefficients[missing:], unused), biases[0])]
    for left, bias in zip(others, biases[1:], strict=True):
        by_rows = torch.linalg.solve(owner[pivots].T, left.T).T
        stored.append(_with_bias({"B.weight": pad(by_rows, unused).float()}, bias))
    return stored


def _with_bias(tensors: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
    return tensors if bias is None else tensors | {"B.bias": bias}


def _scales(artefacts: Artefacts) -> list[Tensor]:
    """By what a weight's errors are multiplied to be compared with others' (metric trace), its root."""
    found = []
    for artefact in artefacts:
        right, gram = artefact["right"].double(), artefact.get("gram")
        size = (right * (right if gram is None else right @ gram.double())).sum()
        ratio = artefact["energies"].sum() / size
        found.append(ratio.sqrt() if bool(size > 0) and bool(ratio > 0) else torch.ones_like(size))
    return found
