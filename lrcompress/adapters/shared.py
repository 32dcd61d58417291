"""The folder that `merge` writes and `extract` reads: a basis for every module, and what belongs to which task."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.checkpoint.reader import CheckpointReader, read_json
from lrcompress.errors import InputError
from lrcompress.formats.low_rank import LowRank
from lrcompress.linalg.truncation import retruncate

SHARED, FILES = "shared", "files"
SCHEMA = 1


@dataclass(frozen=True)
class Element:
    """A part of a module's basis that is kept: stored factors (out, r) and (r, in), a coefficient for each task."""

    left: Tensor
    right: Tensor
    coefficients: Tensor


def combined(elements: Sequence[Element], member: int, most: int | None) -> tuple[Tensor, Tensor]:
    """Factors of a task's matrix, in the dtypes of its elements: at most `most` components, or all above rounding."""
    left = torch.cat([e.coefficients[member].double() * e.left.double() for e in elements], dim=1)
    spectrum = retruncate(left, torch.cat([e.right.double() for e in elements]))
    rounding = max(torch.finfo(t.dtype).eps for t in (elements[0].left, elements[0].right)) ** 2
    real = max(int((spectrum.energies > rounding * spectrum.energies[:1].sum()).sum()), 1)
    rank = real if most is None else min(most, len(spectrum.energies))
    stored = LowRank.encode(spectrum.left[:, :rank].float(), spectrum.right[:rank].float(), None)
    return stored["B.weight"].to(elements[0].left.dtype), stored["A.weight"].to(elements[0].right.dtype)


def read_index(folder: Path, label: str) -> dict[str, Any]:
    """shared.json of a folder; InputError where merge did not write it."""
    path = folder / f"{SHARED}.json"
    if not path.is_file():
        raise InputError(f"{label} has no {path.name}: give a folder that merge wrote")
    index: Any = read_json(path)
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        raise InputError(f"{path} has another layout than this lrcompress reads ({SCHEMA}): upgrade it, or merge again")
    return index


def load_elements(reader: CheckpointReader, module: str) -> list[Element]:
    """The elements of a module's basis, in their order."""
    count = sum(name.startswith(f"{module}|") and name.endswith("|left") for name in reader.names())
    found = []
    for j in range(count):
        keys = [f"{module}|{j}|{key}" for key in ("left", "right", "coefficients")]
        stored = dict(reader.read(keys))
        found.append(Element(*(stored[key] for key in keys)))
    return found
