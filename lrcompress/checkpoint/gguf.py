"""A GGUF file as an ordinary folder: dequantised tensor by tensor to float32."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.checkpoint.cache import conversion_folder
from lrcompress.checkpoint.writer import ShardedWriter, disk_errors
from lrcompress.errors import InputError
from lrcompress.model.skeleton import check_sizes, empty_model, library_errors

SHARD_BYTES = 5 * 10**9
BIAS_SWITCHES = ("attention_bias", "mlp_bias")
"""Names in configs of whether linear layers have biases."""


def converted_gguf(path: Path) -> Path:
    """The folder of `path`'s config, tokenizer and float32 safetensors, made where the cache does not have it."""
    folder = conversion_folder(path)
    if folder.exists():
        return folder
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        with library_errors(f"{path} cannot be read as GGUF", "download it again"), disk_errors(temporary):
            _convert(path, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    config, tokenizer = _read_metadata(path)
    check_sizes(config, len(reader.tensors), sum(int(tensor.n_elements) for tensor in reader.tensors))
    model: Any = empty_model(config)
    names, processor = _names(model, reader)
    if _unread(reader, names):  # GGUF has no word for biases, and llama.cpp takes those that are there
        for switch in BIAS_SWITCHES:
            if getattr(config, switch, None) is False:
                setattr(config, switch, True)
        model = empty_model(config)
        names, processor = _names(model, reader)
    if unread := _unread(reader, names):
        raise InputError(f"{path} holds {unread[0]}, for which transformers' {type(model).__name__} has no place")
    shapes = {k: v for k, v in model.state_dict().items()}
    found = [names[t.name] for t in reader.tensors if t.name in names]
    missing = {n for n in shapes if n not in found} - set(getattr(model, "_tied_weights_keys", None) or {})
    if missing:
        raise InputError(
            f"{path} has no tensor for {min(missing)}: its architecture is not fully known to transformers"
        )
    config.architectures = [type(model).__name__]  # GGUF has no such name, and other tools go by it
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    writer = ShardedWriter(folder, [(n, torch.empty(shapes[n].shape, device="meta")) for n in found], SHARD_BYTES)
    writer.write(_tensors(reader, names, processor, config))
    writer.close()


def _read_metadata(path: Path) -> tuple[Any, Any]:
    """Config and tokenizer as transformers reads them from GGUF."""
    from transformers import AutoConfig, AutoTokenizer

    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return config, tokenizer


def _names(model: Any, reader: Any) -> tuple[dict[str, str], Any]:
    """GGUF tensor name to model name, and transformers' processor that undoes llama.cpp's permutations."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    field = reader.fields["general.architecture"]
    architecture = str(bytes(field.parts[field.data[0]]), encoding="utf8")
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    return get_gguf_hf_weights_map(model, processor), processor


def _unread(reader: Any, names: dict[str, str]) -> list[str]:
    """Tensors of the file that the model has no place for; tables of rotary factors follow from the config."""
    return [
        tensor.name for tensor in reader.tensors if tensor.name not in names and not tensor.name.startswith("rope_")
    ]


def _tensors(reader: Any, names: dict[str, str], processor: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    from gguf import dequantize

    parsed: dict[str, Any] = {"tensors": {}, "config": config.to_dict()}
    for tensor in reader.tensors:
        if tensor.name not in names:
            continue
        weights = dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed
        )
        yield names[tensor.name], torch.from_numpy(np.array(result.weights, dtype=np.float32))
