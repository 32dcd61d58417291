"""What was decomposed as it is stored: a weight's tensors at its planned level, in the written dtype."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.checkpoint.writer import write_tensors
from lrcompress.finite import all_finite
from lrcompress.formats import DENSE, possible_places, stored_tensors
from lrcompress.parallel.side_by_side import side_by_side
from lrcompress.precision import placed
from lrcompress.protocols import Site, Spec
from lrcompress.stages.allocate import Plan
from lrcompress.stages.decompose import double_bytes
from lrcompress.stages.opened import Opened
from lrcompress.stages.profile import STORED, Artefacts

LENGTH = "length"
"""The parameter of a spec that encoding finds."""

STREAMS = ("stream", "table.stream")
"""What the stored tensor of that length is called."""


def encode_site(opened: Opened, site: Site, spec: Spec, artefact: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a compressed site on the CPU, in the written dtype; one that stays as it is, from the files."""
    if site.stored is not None and spec == site.stored:
        assert isinstance(opened.reader, Multiplied)
        return as_stored(opened, site, opened.reader.stored(site.name))
    return as_stored(opened, site, opened.request.method.encode(spec, artefact, dense_bias(opened, site)))


def as_encoded(spec: Spec, stored: dict[str, Tensor]) -> Spec:
    """`spec` with the length that a stream of entropy-coded numbers turned out to have."""
    if LENGTH not in spec.parameters:
        return spec
    stream = next(stored[name] for name in STREAMS if name in stored)
    return replace(spec, parameters={**spec.parameters, LENGTH: len(stream)})


def dense_bias(opened: Opened, site: Site) -> Tensor | None:
    """The bias, float32, of the layer that is compressed."""
    key = opened.walker.names.get(site.name + ".bias")
    return opened.reader.tensor(key).float() if key else None


def as_stored(opened: Opened, site: Site, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a method encoded, on the CPU, in the written dtype, with the empty weight."""
    dtype = opened.dtype
    stored = {k: t.to(dtype) if t.is_floating_point() else t for k, t in raw.items()}
    stored["weight"] = torch.empty(0, dtype=dtype)
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ArithmeticError(f"{site.name}: {name} does not fit into {dtype}")
    return {k: t.cpu() for k, t in stored.items()}


class Encoder:
    """The stored tensors of one block's sites, encoded once and kept while the block is being written.

    Sites that share are encoded all at once, when the first of them is asked for, into a scratch file; without it, as
    after an interruption, they are encoded again. They come with what they share, whoever stores it.
    """

    def __init__(self, opened: Opened, plan: Plan, artefacts: Artefacts, scratch: Path) -> None:
        self._opened, self._plan, self._artefacts, self._scratch = opened, plan, artefacts, scratch
        self._sites = {site.name: site for site in opened.sites}
        self._encoded: dict[str, dict[str, Tensor]] = {}

    def __call__(self, name: str) -> dict[str, Tensor]:
        """State dict of a compressed site, in the written dtype."""
        if name not in self._encoded:
            family = self._plan.family(name)
            if len(family) > 1:
                self._encoded[name] = self._shared(name, family)
            else:
                self._encoded[name] = self._alone(name)
        return self._encoded[name]

    def prepare(self, sites: Sequence[Site]) -> None:
        """Encode those of `sites` that are compressed, and share nothing, small ones side by side."""
        compressed = [site for site in sites if self._plan.specs[site.name].format != DENSE]
        alone = [site for site in compressed if len(self._plan.family(site.name)) == 1]
        device = self._opened.request.device
        encoded = side_by_side(lambda site: self._alone(site.name), alone, double_bytes, device)
        self._encoded |= {site.name: tensors for site, tensors in zip(alone, encoded, strict=True)}

    def put_by(self, owner: str) -> None:
        """Encode a weight, and those that share with it, for the encoders of other processes."""
        family = self._plan.family(owner)
        if len(family) > 1:
            self._shared(owner, family)
        elif not self._alone_path(owner).exists():
            write_tensors(self._alone_path(owner), self._alone(owner))

    def _alone_path(self, name: str) -> Path:
        return self._scratch / f"encoded-{name}.safetensors"

    def _alone(self, name: str) -> dict[str, Tensor]:
        if self._alone_path(name).exists():
            with safe_open(self._alone_path(name), framework="pt") as file:
                return {key: file.get_tensor(key).clone() for key in file.keys()}
        artefact = self._artefact(name)
        stored = {key.removeprefix(STORED): tensor.cpu() for key, tensor in artefact.items() if key.startswith(STORED)}
        return stored or encode_site(self._opened, self._sites[name], self._plan.specs[name], artefact)

    def _artefact(self, name: str) -> dict[str, Tensor]:
        device = self._opened.request.device
        return {key: placed(tensor, device) for key, tensor in self._artefacts.load(self._sites[name]).items()}

    def _shared(self, name: str, family: list[str]) -> dict[str, Tensor]:
        path = self._scratch / f"shared-{family[0]}.safetensors"
        if not path.exists():
            write_tensors(path, self._encode_together(family))
        spec = self._plan.specs[name]
        with safe_open(path, framework="pt") as file:
            stored, found = set(file.keys()), {}
            for key in stored_tensors(spec.alone(), self._opened.dtype):
                possible = possible_places(key, f"{name}|", f"{family[0]}|")
                found[key] = file.get_tensor(next(place for place in possible if place in stored)).clone()
            return found

    def _encode_together(self, family: list[str]) -> dict[str, Tensor]:
        sites = [self._sites[name] for name in family]
        raw = self._opened.request.method.encode_together(
            [self._plan.specs[name] for name in family],
            [self._artefact(name) for name in family],
            [dense_bias(self._opened, site) for site in sites],
        )
        encoded = [as_stored(self._opened, site, part) for site, part in zip(sites, raw, strict=True)]
        return {f"{site.name}|{k}": t for site, part in zip(sites, encoded, strict=True) for k, t in part.items()}
