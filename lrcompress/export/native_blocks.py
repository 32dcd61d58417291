"""Weights of a checkpoint in llama.cpp's blocks: its own and integers as they are, everything else rounded to Q8_0.

The corrections of a sum become a LoRA file beside the model's.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.evaluation.loading import load_model
from lrcompress.export.block_file import named_after, stored_as, write_file
from lrcompress.export.packed import Codes, base_of, read_codes
from lrcompress.export.rounding import perplexity_rise
from lrcompress.export.source import Source
from lrcompress.foreign.converter import Converted
from lrcompress.foreign.one_rank import one_rank, padded
from lrcompress.formats.ggml import Ggml
from lrcompress.formats.quantized import Quantized
from lrcompress.formats.sum import Sum
from lrcompress.ggml.types import BLOCK_TYPES, Blocks

BLOCK = 32
"""Numbers of a block of every type here, which have one float16 scale, and Q4_1 an offset."""

NARROW = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
"""From the smallest to the largest."""

NEAR = 2**-11
"""Relative error of a scale rounded to float16."""


@dataclass(frozen=True)
class Chosen:
    """A weight in blocks: packed (out, bytes of a row); error: relative to the weight's norm, 0 where all is exact."""

    kind: str
    packed: Tensor
    error: float

    @property
    def dense(self) -> Tensor:
        """(out, in), the numbers that llama.cpp computes with."""
        return BLOCK_TYPES[self.kind].dense(self.packed)


def of_codes(found: Codes) -> Chosen | None:
    """The smallest type that holds the numbers, else one that differs by the rounding of scales alone; None if none."""
    weight, width = found.dense.float(), found.codes.shape[1]
    if found.group % BLOCK and found.group != width:
        return None
    each = torch.arange(width // BLOCK) * BLOCK // found.group
    scale, zeros = found.scale[:, each].flatten().float(), found.zeros[:, each].flatten().float()
    choices = [choice for kind in NARROW if (choice := _blocks(kind, found, scale, zeros, weight)) is not None]
    exact = next((choice for choice in choices if choice.error == 0), None)
    return exact or next((choice for choice in choices if choice.error <= NEAR), None)


def _blocks(kind: str, found: Codes, scale: Tensor, zeros: Tensor, weight: Tensor) -> Chosen | None:
    block = BLOCK_TYPES[kind]
    codes = found.codes.short() if block.has_minimum else found.signed - block.levels[0]
    if int(codes.min()) < 0 or int(codes.max()) >= len(block.levels):
        return None
    minimum = (scale * zeros).half().float() if block.has_minimum else None
    packed = block.pack(Blocks(codes.reshape(-1, BLOCK).to(torch.uint8), scale.half().float(), minimum))
    packed = packed.reshape(len(weight), -1)
    return Chosen(kind, packed, _error(block.dense(packed), weight))


def of_numbers(weight: Tensor) -> Chosen:
    """Q8_0, every block rounded to its largest number."""
    block = BLOCK_TYPES["Q8_0"]
    values = weight.float().reshape(-1, BLOCK)
    scale = (values.abs().amax(1) / 127).half().float()
    codes = (values / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]).round().clamp(-127, 127)
    packed = block.pack(Blocks((codes - block.levels[0]).to(torch.uint8), scale)).reshape(len(weight), -1)
    return Chosen("Q8_0", packed, _error(block.dense(packed), weight.float()))


def _error(found: Tensor, weight: Tensor) -> float:
    norm = float(weight.double().norm())
    return float((found - weight).double().norm()) / norm if norm > 0 else 0.0


class NativeBlocks:
    """What the tensors of a converted file become; `names` says which rows of which module each holds."""

    def __init__(self, source: Source, converted: Path, names: Converted) -> None:
        from gguf import GGUFReader

        self.source, self.names = source, names
        self.converted, self.reader = converted, GGUFReader(converted)
        modules = source.manifest.modules
        self.site = {
            tensor: rows.site[0]
            for tensor, rows in names.rows.items()
            if len(set(rows.site)) == 1 and len(rows.row) == modules[rows.site[0]].shape[0]
        }
        self.left = sorted(set(modules) - set(self.site.values()))
        self.site = {name: site for name, site in self.site.items() if modules[site].shape[1] % BLOCK == 0}
        self.narrow = sorted(name for name, spec in modules.items() if spec.shape[1] % BLOCK and name not in self.left)
        self.corrected: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.kinds: dict[str, str | None] = {tensor.name: None for tensor in self.reader.tensors}
        for tensor, site in self.site.items():
            chosen = self.chosen(site)
            self.kinds[tensor], self.errors[site] = chosen.kind, chosen.error
            if modules[site].format == Sum.name:
                self.corrected[tensor] = site

    def chosen(self, site: str) -> Chosen:
        """A module's weight in blocks, without its correction where the base has blocks of its own."""
        base = base_of(self.source.manifest.modules[site])
        if base.format == Ggml.name:
            layer: Any = self.source.layer(site)
            layer = layer.base if isinstance(layer, Sum) else layer
            return Chosen(base.parameters["type"], layer.blocks, 0.0)
        if base.format == Quantized.name:
            found = of_codes(read_codes(self.source, site))
            if found is not None:
                return found
        return of_numbers(self._numbers(site))

    def _numbers(self, site: str) -> Tensor:
        layer: Any = self.source.layer(site)
        return (layer.base if isinstance(layer, Sum) else layer).dense().detach()

    def weight(self, site: str) -> Tensor:
        """(out, in), what llama.cpp multiplies by, LoRA included."""
        layer, found = self.source.layer(site), self.chosen(site).dense
        if isinstance(layer, Sum):
            left, right = layer.factors()
            found = found + (left @ right).detach()
        return found

    def write(self, output: Path) -> Path:
        """The model's file; the converted one where nothing changes."""
        count = Counter(kind for kind in self.kinds.values() if kind is not None)
        if not count:
            return self.converted
        makers = {tensor.name: self._maker(tensor) for tensor in self.reader.tensors}
        write_file(self.reader, output, named_after(count.most_common(1)[0][0]), self.kinds, makers)
        return output

    def _maker(self, tensor: Any) -> Any:
        site = self.site.get(tensor.name)
        if site is None:
            return lambda: tensor.data
        shape = stored_as(tensor, self.kinds[tensor.name])[1]
        rows = self.names.rows[tensor.name].row
        return lambda: self.chosen(site).packed[rows].numpy().reshape(shape)

    def write_lora(self, path: Path) -> None:
        """The corrections, of one rank and as they are."""
        from gguf import GGUFWriter

        modules = self.source.manifest.modules
        rank = one_rank([modules[site].rank for site in self.corrected.values()])
        writer = GGUFWriter(path, self.reader.fields["general.architecture"].contents())
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        for tensor, site in self.corrected.items():
            layer = self.source.layer(site)
            assert isinstance(layer, Sum)
            left, right = layer.factors()
            right, left = padded(right.detach(), left.detach(), rank)
            writer.add_tensor(f"{tensor}.lora_a", np.ascontiguousarray(right.numpy()))
            writer.add_tensor(f"{tensor}.lora_b", np.ascontiguousarray(left[self.names.rows[tensor].row].numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def measured(self, checkpoint: str, *, trust_remote_code: bool) -> dict[str, Any]:
        """What the blocks differ from the checkpoint: the largest relative error of a weight, and on text."""
        inexact = [site for site, error in self.errors.items() if error > 0]
        count = Counter(kind for kind in self.kinds.values() if kind is not None)
        found: dict[str, Any] = {
            "types": dict(count),
            "relative_error": max(self.errors.values(), default=0.0),
            "loss": None,
            "notes": [],
        }
        if inexact:
            loaded = load_model(checkpoint, trust_remote_code=trust_remote_code)
            found["loss"] = perplexity_rise(loaded, inexact, self.weight, trust_remote_code=trust_remote_code)
            found["notes"].append(
                f"{len(inexact)} weights rounded, by {found['relative_error']:.5f} of their size at most: perplexity "
                f"{found['loss']:+.3%} on python-docs"
            )
        if exact := len(self.errors) - len(inexact):
            found["notes"].append(f"{exact} weights hold the checkpoint's numbers exactly")
        for names, why in (
            (self.narrow, f"rows that are no multiple of {BLOCK}"),
            (self.left, "its rows are not ours"),
        ):
            if names:
                found["notes"].append(f"{len(names)} weights ({names[0]}, ...) are as the converter writes them: {why}")
        return found
