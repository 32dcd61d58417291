"""Low-rank weights that share their right factor, from the artefacts that the low-rank methods leave."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrcompress.formats import restored
from lrcompress.formats.pivoted import Pivoted
from lrcompress.linalg.concatenation import Joint, joint
from lrcompress.linalg.pivoting import pivot_rows
from lrcompress.precision import exact, widened
from lrcompress.protocols import Spec

Artefacts = Sequence[dict[str, Tensor]]


def joined(artefacts: Artefacts) -> Joint:
    """The joint truncation of the weights, each counted as its method weighs it."""
    return joint(weighed(artefacts), [artefact.get("gram") for artefact in artefacts])


def weighed(artefacts: Artefacts) -> list[Tensor]:
    """Right factors (k, in), wide, whose squared lengths in the metric of the inputs are the energies."""
    return [widened(artefact["right"]) * scale for artefact, scale in zip(artefacts, _scales(artefacts), strict=True)]


def encode_joined(
    specs: Sequence[Spec], artefacts: Artefacts, biases: Sequence[Tensor | None], found: Joint
) -> list[dict[str, Tensor]]:
    """Stored tensors of weights at one rank, the owner of the right factor, `low_rank` or `pivoted`, first.

    found: what `joined` makes of the artefacts.
    """
    rank = specs[0].rank
    pivoted = specs[0].format == Pivoted.name
    count = min(rank, found.spanned(0) if pivoted else len(found.right))
    right = found.right[:count]
    lefts = [
        widened(artefact["left"]) @ found.left(b, count) / scale
        for b, (artefact, scale) in enumerate(zip(artefacts, _scales(artefacts), strict=True))
    ]
    moved = [
        with_mean(bias, artefact, exact(left) @ (exact(right) @ artefact["mean"])) if "mean" in artefact else bias
        for artefact, left, bias in zip(artefacts, lefts, biases, strict=True)
    ]
    missing = rank - count  # no component is left for these
    if pivoted:
        return _by_pivots(lefts, right, missing, moved)
    return _by_factors(lefts, right, missing, moved)


def rounding_loss(specs: Sequence[Spec], artefacts: Artefacts, found: Joint, dtype: torch.dtype) -> float:
    """How many times larger the joint error is once it is stored in `dtype`, in the metric of the inputs.

    What any storage loses is left out: four times what the dense weights lose, a quarter of which factors of moderate
    coefficients do. Coefficients of pivot rows that tell the weights' directions apart badly lose far more.
    """
    biases = [torch.zeros(spec.shape[0]) if spec.bias else None for spec in specs]
    encoded = encode_joined(specs, artefacts, biases, found)
    lent = encoded[0]["pivot.weight" if specs[0].format == Pivoted.name else "A.weight"]
    exact = stored = anyway = 0.0
    for spec, tensors, artefact, scale in zip(specs, encoded, artefacts, _scales(artefacts), strict=True):
        weight, gram = widened(artefact["left"]) @ widened(artefact["right"]), artefact.get("gram")
        own = tensors if spec.owner is None else {**tensors, "A.weight": lent}
        rounded = {key: t.to(dtype) if t.is_floating_point() else t for key, t in own.items()}
        errors = [weight - restored(spec, held, weight.dtype).dense() for held in (own, rounded)]
        errors.append(weight - widened(weight.to(dtype)))
        sizes = [float(scale**2 * (e * (e if gram is None else e @ widened(gram))).sum()) for e in errors]
        exact, stored, anyway = exact + sizes[0], stored + sizes[1], anyway + sizes[2]
    added = max(0.0, stored - exact - 4 * anyway)
    if exact <= 0:
        return 1.0 if added == 0 else math.inf
    return 1 + added / exact


def with_mean(bias: Tensor | None, artefact: dict[str, Tensor], given: Tensor) -> Tensor:
    """The bias that also carries what the mean input gives, less what the factors make of it, `given` (out,)."""
    missing = artefact["mean_output"] - given
    return (missing if bias is None else bias.to(missing) + missing).float()


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
        right, gram = widened(artefact["right"]), artefact.get("gram")
        size = (right * (right if gram is None else right @ widened(gram))).sum()
        ratio = artefact["energies"].sum() / size
        found.append(ratio.sqrt() if bool(size > 0) and bool(ratio > 0) else torch.ones_like(size))
    return found
