"""A GGUF file of block types: the converter's file with its matrices in the blocks that a checkpoint holds."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.export.source import Source
from lrcompress.foreign.converter import Converted, Weight, model_of, numbers_of
from lrcompress.formats.ggml import Ggml
from lrcompress.ggml.file_types import FILE_TYPES, OTHERS, Shape, types_of
from lrcompress.ggml.rounding import round_weight
from lrcompress.ggml.types import BLOCK_TYPES
from lrcompress.protocols import Spec

SLAB = 2**22
"""Numbers of a matrix that no calibration text speaks of which are rounded at a time."""

QUANTISATION_VERSION = 2


def holds_blocks(source: Source) -> bool:
    """Whether a checkpoint is a GGUF file's: weights in llama.cpp's blocks, and none that corrects such ones."""
    blocks = any(spec.format == Ggml.name for spec in source.manifest.modules.values())
    return blocks and ((source.report or {}).get("recipe") or {}).get("base") is None


def block_weights(source: Source) -> dict[str, Weight]:
    """The weights in blocks, as they lie in a dense checkpoint of the same model."""
    modules = source.manifest.modules.items()
    return {name: Weight(f"{name}.weight", spec.conv1d) for name, spec in modules if spec.format == Ggml.name}


def file_type_of(source: Source) -> str | None:
    """The file type that the checkpoint was made for, None for a size; InputError where its report does not say."""
    recipe = (source.report or {}).get("recipe") or {}
    found = recipe.get("type")
    if found is None and (recipe.get("bpw") or recipe.get("size")):
        return None
    if found not in FILE_TYPES:
        raise InputError(f"the report of {source.label} does not say for which --type its blocks are: compress again")
    return str(found)


def most_common(source: Source) -> str:
    """The file type whose main block type most of the checkpoint's weights have."""
    numbers: Counter[str] = Counter()
    for spec in source.manifest.modules.values():
        if spec.format == Ggml.name:
            numbers[spec.parameters["type"]] += spec.shape[0] * spec.shape[1]
    return named_after(numbers.most_common(1)[0][0])


def named_after(kind: str) -> str:
    """The file type for a file most of whose weights have this block type."""
    found = [name for name, (_, main) in FILE_TYPES.items() if main == kind]
    return next((name for name in (f"{kind}_M", kind, *found) if name in found), OTHERS)


def write_blocks(source: Source, converted: Path, names: Converted, output: Path) -> None:
    """Write `output`: the file `converted`, each matrix in the type that llama-quantize would give it.

    Blocks of the checkpoint are taken as they are, their rows in the converter's order; what it does not hold in such
    blocks (embeddings, output head) is rounded here, by its own numbers.
    """
    from gguf import GGUFReader

    reader, file_type = GGUFReader(converted), file_type_of(source)
    shapes = [Shape(t.name, tuple(int(axis) for axis in reversed(t.shape.tolist()))) for t in reader.tensors]
    types = types_of(file_type or OTHERS, shapes, model_of(reader))
    if file_type is None:
        types |= _own_types(source, names)
    makers = {
        tensor.name: _maker(source, names, tensor, types[shape.name])
        for tensor, shape in zip(reader.tensors, shapes, strict=True)
    }
    write_file(reader, output, file_type or most_common(source), types, makers)


def write_file(
    reader: Any, output: Path, file_type: str, types: Mapping[str, str | None], makers: Mapping[str, Callable[[], Any]]
) -> None:
    """Write `output`: what gguf's `reader` has, each tensor as its type in `types` with the data that its maker gives.

    None is the type that it has.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(output, "", endianess=reader.endianess)
    _copy_metadata(reader, writer, file_type)
    for tensor in reader.tensors:
        kind, bytes_shape, dtype = stored_as(tensor, types[tensor.name])
        size = int(np.prod(bytes_shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(tensor.name, bytes_shape, np.dtype(dtype), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(makers[tensor.name]())
    writer.close()


def _own_types(source: Source, names: Converted) -> dict[str, str | None]:
    """Of tensors all of whose rows the checkpoint holds in blocks of one type, that type."""
    found: dict[str, str | None] = {}
    for tensor, rows in names.rows.items():
        kinds = {_type_of(source.manifest.modules.get(site)) for site in set(rows.site)}
        if len(kinds) == 1 and None not in kinds:
            found[tensor] = kinds.pop()
    return found


def _copy_metadata(reader: Any, writer: Any, file_type: str) -> None:
    from gguf import GGUFValueType

    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.file_type", "general.quantization_version"):
            continue
        kind = field.types[0]
        if key == "general.architecture":  # the writer has one already, from its constructor
            writer.arch = field.contents()
            writer.kv_data[0].pop(key, None)
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    writer.add_file_type(FILE_TYPES[file_type][0])
    writer.add_quantization_version(QUANTISATION_VERSION)


def stored_as(tensor: Any, kind: str | None) -> tuple[Any, tuple[int, ...], Any]:
    """gguf's type, the shape and the dtype of what is written for a tensor."""
    from gguf import GGMLQuantizationType

    axes = tuple(int(axis) for axis in reversed(tensor.shape.tolist()))
    if kind is None:
        return tensor.tensor_type, tuple(tensor.data.shape), tensor.data.dtype
    if kind == "F16":
        return GGMLQuantizationType.F16, axes, np.float16
    row = BLOCK_TYPES[kind].bytes_of(1, axes[-1])
    return GGMLQuantizationType[kind], (*axes[:-1], row), np.uint8


def _maker(source: Source, names: Converted, tensor: Any, kind: str | None) -> Callable[[], Any]:
    """What makes the data of a tensor when its turn comes."""
    if kind is None:
        return lambda: tensor.data
    if kind == "F16":
        return lambda: numbers_of(tensor).half().numpy()
    held = names.rows.get(tensor.name)
    modules = source.manifest.modules
    if held is not None and all(_type_of(modules.get(site)) == kind for site in set(held.site)):
        return lambda: _taken(source, held.site, held.row).numpy().reshape(stored_as(tensor, kind)[1])
    return lambda: torch.cat(list(_rounded(tensor, kind))).numpy().reshape(stored_as(tensor, kind)[1])


def _type_of(spec: Spec | None) -> str | None:
    """The block type of a weight, None where it lies in none."""
    return spec.parameters["type"] if spec is not None and spec.format == Ggml.name else None


def _taken(source: Source, sites: list[str], rows: Tensor) -> Tensor:
    """The checkpoint's own blocks of these rows, (rows, bytes of a row)."""
    found: Tensor | None = None
    places: dict[str, list[int]] = {}
    for place, site in enumerate(sites):
        places.setdefault(site, []).append(place)
    for site, where in places.items():
        blocks = source.reader.tensor(f"{site}.blocks")
        found = torch.empty(len(sites), blocks.shape[1], dtype=torch.uint8) if found is None else found
        found[where] = blocks[rows[where]]
    assert found is not None
    return found


def _rounded(tensor: Any, kind: str) -> Iterator[Tensor]:
    """Blocks, each rounded by itself: (blocks, bytes of one) after another."""
    block = BLOCK_TYPES[kind]
    for part in numbers_of(tensor).reshape(-1, block.block).split(SLAB // block.block):
        yield round_weight(block, part)
