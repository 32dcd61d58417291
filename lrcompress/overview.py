"""What could be done with a model: its size, its weights by kind, and what a compression would take and give."""

from dataclasses import dataclass

import psutil

from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import block_and_kind
from lrcompress.stages.needs import Needs, needs
from lrcompress.stages.opening import open_request
from lrcompress.stages.request import check_request

BITS = (8, 4, 3, 2)


@dataclass(frozen=True)
class Overview:
    """bytes: of the model as it would be written; numbers: weights that are compressed, by kind.

    other: bytes of all else; free: bytes of memory that are there now.
    """

    model: str
    dtype: str
    blocks: int
    bytes: int
    numbers: dict[str, int]
    other: int
    needs: Needs
    free: int

    def size(self, bits: float) -> int:
        """Bytes of the checkpoint at so many bits for each of the compressed weights."""
        return round(self.other + sum(self.numbers.values()) * bits / 8)


def overview(model: str, *, reporter: Reporter | None = None) -> Overview:
    """What MODEL is, without reading its weights or a text."""
    asked = {"model": model, "method": "auto", "bpw": min(BITS)}
    opened = open_request(check_request(make_recipe(asked)), reporter or Reporter(quiet=True), calibrate=False)
    numbers: dict[str, int] = {}
    for site in opened.sites:
        kind = block_and_kind(site.name)[1]
        numbers[kind] = numbers.get(kind, 0) + site.shape[0] * site.shape[1]
    whole = opened.dense_checkpoint_bytes
    other = whole - sum(numbers.values()) * opened.dtype.itemsize
    dtype, free = str(opened.dtype).removeprefix("torch."), psutil.virtual_memory().available
    return Overview(model, dtype, len(opened.blocks), whole, numbers, other, needs(opened), free)
