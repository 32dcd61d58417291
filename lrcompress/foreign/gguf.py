"""A GGUF file as an ordinary folder: dequantised tensor by tensor to float32."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.checkpoint.cache import conversion_folder
from lrcompress.checkpoint.writer import ShardedWriter, disk_errors
from lrcompress.errors import InputError
from lrcompress.foreign.gguf_metadata import Metadata, settle
from lrcompress.foreign.gguf_parts import parts_of
from lrcompress.foreign.gguf_rotary import TABLES, check_rotary, settle_rotary
from lrcompress.model.skeleton import check_sizes, empty_model, library_errors

SHARD_BYTES = 5 * 10**9
BIAS_SWITCHES = ("attention_bias", "mlp_bias")
"""Names in configs of whether linear layers have biases."""

ARRAY = 9
"""Type of a value that is a list, in GGUF."""
HEAD = "output.weight"
SAFETENSORS = "start from the safetensors that it was made from"
READING = 2
"""Raised where files are read otherwise than before, so that what was converted before is not used."""


def converted_gguf(path: Path) -> Path:
    """The folder of config, tokenizer and float32 safetensors that the file and its other parts give.

    Made where the cache does not have it.
    """
    parts = parts_of(path)
    folder = conversion_folder(parts, READING)
    if folder.exists():
        return folder
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    cure = "it is damaged, or of a kind that transformers' GGUF reader does not know; start from its safetensors"
    try:
        with library_errors(f"{path} cannot be read as GGUF", cure), disk_errors(temporary):
            _convert(_open(parts), temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class _File:
    """A whole model: the first part's path and keys, the tensors of all parts."""

    path: Path
    fields: dict[str, Any]
    tensors: list[Any]
    first: int
    """How many of these are in the first part."""

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key, a list where it is one in the file."""
        from transformers.modeling_gguf_pytorch_utils import read_field

        if key not in self.fields:
            return default
        found = read_field(self, key)
        return found if self.fields[key].types[0] == ARRAY else found[0]


def _open(parts: Sequence[Path]) -> _File:
    """All parts of a model; InputError where they do not belong together."""
    from gguf import GGUFReader

    readers = [GGUFReader(part) for part in parts]
    file = _File(
        parts[0],
        readers[0].fields,
        [tensor for reader in readers for tensor in reader.tensors],
        len(readers[0].tensors),
    )
    count = file.value("split.count", 1)
    if count > 1 and count != len(parts):
        raise InputError(
            f"{parts[0]} is one of {count} parts: give them the names that gguf-split gave them "
            "(NAME-00001-of-00002.gguf and so on), side by side"
        )
    if len({tensor.name for tensor in file.tensors}) != file.value("split.tensors.count", len(file.tensors)):
        raise InputError(f"the {len(parts)} parts of {parts[0]} hold other tensors than they say: download them again")
    return file


def _convert(file: _File, folder: Path) -> None:
    path = file.path
    config, tokenizer = _read_config(path)
    metadata = _metadata(file)
    settle(config, metadata)
    check_sizes(config, len(file.tensors), sum(int(tensor.n_elements) for tensor in file.tensors))
    if config.tie_word_embeddings and any(tensor.name == HEAD for tensor in file.tensors[file.first :]):
        config.tie_word_embeddings = False  # transformers has looked for it in the first part
    model: Any = _rotating(config, metadata)
    names, processor = _names(model, file, metadata.architecture)
    if _unread(file, names):  # GGUF has no word for biases, and llama.cpp takes those that are there
        for switch in BIAS_SWITCHES:
            if getattr(config, switch, None) is False:
                setattr(config, switch, True)
        model = _rotating(config, metadata)
        names, processor = _names(model, file, metadata.architecture)
    if unread := _unread(file, names):
        raise InputError(
            f"{path} holds {unread[0]}, for which transformers' {type(model).__name__} has no place: {SAFETENSORS}"
        )
    shapes = {k: v for k, v in model.state_dict().items()}
    last = {names[t.name]: i for i, t in enumerate(file.tensors) if t.name in names}
    found = sorted(last, key=last.__getitem__)
    missing = shapes.keys() - last - set(getattr(model, "_tied_weights_keys", None) or {})
    if missing:
        raise InputError(f"{path} has no tensor for {min(missing)}: transformers does not know it well, {SAFETENSORS}")
    config.architectures = [type(model).__name__]  # GGUF has no such name, and other tools go by it
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    writer = ShardedWriter(folder, [(n, torch.empty(shapes[n].shape, device="meta")) for n in found], SHARD_BYTES)
    writer.write((n, _shaped(t, shapes[n].shape)) for n, t in _tensors(file, names, last, processor, config))
    writer.close()


def _read_config(path: Path) -> tuple[Any, Any]:
    """Config and tokenizer as transformers reads them from GGUF."""
    from transformers import AutoConfig, AutoTokenizer

    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return config, tokenizer


def _metadata(file: _File) -> Metadata:
    """The file's keys and tables that say what is computed; InputError where it is no model."""
    from gguf import dequantize

    kind = file.value("general.type", "model")
    if kind != "model":
        raise InputError(f"{file.path} holds no model but {kind} (general.type): pass the model's file")
    architecture = file.value("general.architecture", "")
    own = f"{architecture}."
    values = {key.removeprefix(own): file.value(key) for key in file.fields if key.startswith(own)}
    tables = {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        for tensor in file.tensors
        if tensor.name in TABLES
    }
    return Metadata(file.path, architecture, values, tables)


def _rotating(config: Any, metadata: Metadata) -> Any:
    """The empty model of `config`, which is given the file's rotary embedding first."""
    model = empty_model(config)
    if settle_rotary(config, model, metadata):
        model = empty_model(config)
        check_rotary(config, model, metadata)
    return model


def _names(model: Any, file: _File, architecture: str) -> tuple[dict[str, str], Any]:
    """Model name of the file's tensors, and transformers' processor that undoes llama.cpp's permutations."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    known = get_gguf_hf_weights_map(model, processor, architecture)
    # Experts are no modules of their own in the model, so that transformers' names for them lack this ending.
    found = {t.name: known.get(t.name) or known.get(t.name.removesuffix(".weight")) for t in file.tensors}
    return {name: known for name, known in found.items() if known is not None}, processor


def _unread(file: _File, names: dict[str, str]) -> list[str]:
    """Tensors of the file that the model has no place for."""
    return [tensor.name for tensor in file.tensors if tensor.name not in names and tensor.name not in TABLES]


def _tensors(
    file: _File, names: dict[str, str], last: dict[str, int], processor: Any, config: Any
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as soon as the last one of the file that makes them has been read; `last` gives its place."""
    from gguf import dequantize

    gathered: dict[str, Any] = {}
    parsed = {"tensors": gathered, "config": config.to_dict()}
    mapping = names | {name.removesuffix(".weight"): known for name, known in names.items()}
    for place, tensor in enumerate(file.tensors):
        if tensor.name not in names:
            continue
        weights, known = dequantize(tensor.data, tensor.tensor_type), names[tensor.name]
        result = processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=mapping, parsed_parameters=parsed
        )
        if result.name is not None:
            yield known, torch.from_numpy(np.array(result.weights, dtype=np.float32))
        elif last[known] == place:
            yield known, gathered.pop(known).float()


def _shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """With the model's dimensions of size one, of which GGUF files have more or fewer."""
    same = [size for size in tensor.shape if size != 1] == [size for size in shape if size != 1]
    return tensor.reshape(shape) if same else tensor
