"""Low-rank weights that share their right factor, from the artefacts that the low-rank methods leave."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrcompress.linalg.concatenation import Joint, joint
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
    """Stored tensors of `low_rank` weights at one rank, the owner of the right factor first."""
    found, rank = joined(artefacts), specs[0].rank
    missing = max(0, rank - len(found.right))  # no component is left for these
    right, stored = nn.functional.pad(found.right[:rank], (0, 0, 0, missing)), []
    lefts = [
        nn.functional.pad(artefact["left"].double() @ found.left(b, rank) / scale, (0, missing))
        for b, (artefact, scale) in enumerate(zip(artefacts, _scales(artefacts), strict=True))
    ]
    # One scale a component for all, so that no factor leaves the range of half precision.
    sizes = torch.cat(lefts).norm(dim=0)
    real = (sizes > 0) & (right.norm(dim=1) > 0)
    balance = torch.where(real, (right.norm(dim=1) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)).sqrt(), 1.0)
    for spec, artefact, left, bias in zip(specs, artefacts, lefts, biases, strict=True):
        if "mean" in artefact:
            moved = artefact["mean_output"] - left @ (right @ artefact["mean"])
            bias = (moved if bias is None else bias.double() + moved).float()
        tensors = {"B.weight": (left * balance).float()}
        if spec.owner is None:
            tensors["A.weight"] = (right / balance[:, None]).float()
        stored.append(tensors if bias is None else tensors | {"B.bias": bias})
    return stored


def _scales(artefacts: Artefacts) -> list[Tensor]:
    """By what a weight's errors are multiplied to be compared with others' (metric trace), its root."""
    found = []
    for artefact in artefacts:
        right, gram = artefact["right"].double(), artefact.get("gram")
        size = (right * (right if gram is None else right @ gram.double())).sum()
        ratio = artefact["energies"].sum() / size
        found.append(ratio.sqrt() if bool(size > 0) and bool(ratio > 0) else torch.ones_like(size))
    return found
