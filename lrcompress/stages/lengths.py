"""Stored sizes that encoding finds: their sum is held to what was planned, while weight after weight is coded."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lrcompress.allocators.base import largest_ratio
from lrcompress.budget import bits_per_weight
from lrcompress.errors import NumericalError
from lrcompress.formats import DENSE, spec_bytes
from lrcompress.parallel.processes import processes
from lrcompress.parallel.side_by_side import side_by_side
from lrcompress.protocols import Site, Spec
from lrcompress.report.progress import Reporter
from lrcompress.stages.allocate import Plan
from lrcompress.stages.amount import other_bytes
from lrcompress.stages.decompose import Found, double_bytes
from lrcompress.stages.encode import LENGTH, STREAMS, as_encoded, encode_site
from lrcompress.stages.opened import Opened
from lrcompress.stages.phases import ENCODE
from lrcompress.stages.profile import STORED, Artefacts

LARGEST_SHIFT = 0.25
"""Bits a weight by which the step may move from the plan's, but for the last weights."""

TOLERANCE = 0.002
"""Of what was planned, that may be left over."""

TRIES = 12
"""Of the last weights, until the sum is what was planned: streams of tiny weights have lengths with gaps."""


class Lengths:
    """The plan's weights whose stored length is an estimate, in the order in which they are encoded.

    What the ones before took more or less than planned is spread over those that follow, the same bits on every number
    of theirs: one step for all stays nearly one.
    """

    def __init__(self, opened: Opened, plan: Plan) -> None:
        self._opened, self._plan = opened, plan
        self._planned = {name: spec for name, spec in plan.specs.items() if LENGTH in spec.parameters}
        self._sizes = {name: spec.shape[0] * spec.shape[1] for name, spec in self._planned.items()}
        self._budget = sum(spec.parameters[LENGTH] for spec in self._planned.values())
        self._found: dict[str, int] = {}

    def encode(self, found: Found, block: int) -> Found:
        """The stored tensors of a block's sites, as this process has `found` them; the plan learns their sizes."""
        sites = [
            site for site in self._opened.sites if site.name in found and self._plan.specs[site.name].format != DENSE
        ]
        names = [site.name for site in self._opened.sites_of(block)]
        last = self._planned.keys() <= self._found.keys() | set(names)
        shift, low, high = self._shift(names), -math.inf, math.inf
        numbers = max(sum(self._sizes.get(name, 0) for name in names), 1)
        best: tuple[float, Found, dict[str, Spec]] | None = None
        for _ in range(TRIES if last else 1):
            encoded = self._encoded(found, sites, shift)
            spare = self._budget - sum(self._found.values())
            if not last or 0 <= spare <= TOLERANCE * self._budget:
                return encoded
            if spare >= 0 and (best is None or spare < best[0]):
                best = spare, encoded, {name: self._plan.specs[name] for name in names}
            low, high = (shift, high) if spare > 0 else (low, shift)
            shift += 8 * (spare - TOLERANCE * self._budget / 4) / numbers
            if not low < shift < high:
                shift = (low + high) / 2
        if best is None:
            raise NumericalError(self._too_little())
        for name, spec in best[2].items():
            self._note(name, spec)
        return best[1]

    def _too_little(self) -> str:
        """What to ask for where the weights, as they were encoded last, take more than there is."""
        opened, stored = self._opened, sum(self._plan.bytes.values())
        over = sum(self._found.values()) - self._budget
        bits = math.ceil(100 * bits_per_weight(stored, sum(s.shape[0] * s.shape[1] for s in opened.sites))) / 100
        size = math.ceil((other_bytes(opened) + stored) / 1000)
        ratio = largest_ratio(stored, sum(self._plan.dense_bytes.values()))
        return (
            f"the coded weights take {over} bytes more than planned: ask for at least {bits:.2f} bits a weight "
            f"(--bpw), for {size}KB (--size) or for a ratio of at most {ratio:.4f}"
        )

    def recall(self, artefacts: Artefacts, block: int) -> None:
        """Tell the plan the sizes of a block that an earlier run encoded."""
        for site in self._opened.sites_of(block):
            if site.name in self._planned:
                stored = artefacts.load(site, [STORED + name for name in STREAMS])
                stored = {name.removeprefix(STORED): tensor for name, tensor in stored.items()}
                self._note(site.name, as_encoded(self._plan.specs[site.name], stored))

    def _shift(self, names: Sequence[str]) -> float:
        """Bits a number, more than planned, that the weights still to come may have."""
        ahead = [name for name in self._planned if name not in self._found or name in names]
        left = self._budget - sum(length for name, length in self._found.items() if name not in names)
        wanted = sum(self._planned[name].parameters[LENGTH] for name in ahead)
        numbers = sum(self._sizes[name] for name in ahead)
        return min(max(8 * (left - wanted) / max(numbers, 1), -LARGEST_SHIFT), LARGEST_SHIFT)

    def _encoded(self, found: Found, sites: Sequence[Site], shift: float) -> Found:
        def encoded(site: Site) -> dict[str, Tensor]:
            return encode_site(self._opened, site, self._asked(site.name, shift), found[site.name])

        stored = side_by_side(encoded, sites, double_bytes, self._opened.request.device)
        tensors = {site.name: part for site, part in zip(sites, stored, strict=True)}
        specs = {name: as_encoded(self._plan.specs[name], part) for name, part in tensors.items()}
        for part in processes().gather(specs):
            for name, spec in part.items():
                self._note(name, spec)
        return tensors

    def _asked(self, name: str, shift: float) -> Spec:
        spec = self._plan.specs[name]
        if name not in self._planned:
            return spec
        length = self._planned[name].parameters[LENGTH] + round(shift * self._sizes[name] / 8)
        return replace(spec, parameters={**spec.parameters, LENGTH: max(1, length)})

    def _note(self, name: str, spec: Spec) -> None:
        if name in self._planned:
            self._found[name], self._plan.specs[name] = spec.parameters[LENGTH], spec
            self._plan.bytes[name] = spec_bytes(spec, self._opened.dtype.itemsize)


def encode_all(opened: Opened, plan: Plan, first: Artefacts, scratch: Path, reporter: Reporter) -> Artefacts:
    """Encode every weight before anything is laid out, so that the sizes are known; finished blocks are kept."""
    artefacts, lengths = Artefacts(scratch / "encoded"), Lengths(opened, plan)
    blocks = sorted({site.block for site in opened.sites})
    with reporter.phase(ENCODE, len(blocks)) as tick:
        for block in blocks:
            if artefacts.done(block):
                lengths.recall(artefacts, block)
                tick.skip(1)
                continue
            sites = opened.sites_of(block)
            mine = [sites[place] for place in processes().own([float(s.shape[0] * s.shape[1]) for s in sites])]
            with reporter.timed("write"):
                encoded = lengths.encode({site.name: first.load(site) for site in mine}, block)
            artefacts.save(block, {name: {STORED + k: t for k, t in part.items()} for name, part in encoded.items()})
            tick()
    processes().wait()
    return artefacts
