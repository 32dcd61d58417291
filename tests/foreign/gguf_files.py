"""GGUF files of random models, named and laid out as llama.cpp's converter does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
KEYS: dict[str, Any] = {
    "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0, "vocab_size": 256,
}  # fmt: skip
Rows = Callable[[str, np.ndarray], Mapping[str, np.ndarray]]


def random_model(config: PreTrainedConfig) -> torch.nn.Module:
    """Its norms are about as trained ones are; its numbers are always the same."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if name.endswith("norm.weight"):
                parameter.add_(1)
    return model


def interleaved(heads: Mapping[str, int]) -> Rows:
    """Rows of queries and keys in llama.cpp's order for Llama: the halves of a head by turns."""

    def change(name: str, array: np.ndarray) -> Mapping[str, np.ndarray]:
        count = next((n for kind, n in heads.items() if kind in name), None)
        if count is None:
            return {name: array}
        return {name: array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)}

    return change


def unchanged(name: str, array: np.ndarray) -> Mapping[str, np.ndarray]:
    """As it is."""
    return {name: array}


def tensors_of(model: torch.nn.Module, architecture: str, change: Rows) -> dict[str, np.ndarray]:
    """The model's tensors by their names in GGUF."""
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(kind, 64)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for key, array in change(name, tensor.numpy().astype(np.float32)).items():
            found[str(names.get_name(key, (".weight", ".bias"))) + ("" if "." in key[-7:] else ".weight")] = array
    return found


def write_file(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    common: Mapping[str, Any] = {},
) -> Path:
    """`keys` are the architecture's own, `common` are not; None leaves one out. With a vocabulary of 256 pieces."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in [*((f"{architecture}.{key}", value) for key, value in keys.items()), *common.items()]:
        _add(writer, key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet())[:-2], "ab", "abc"])
    writer.add_token_types([1] * 256)
    writer.add_token_scores([0.0] * 256)
    writer.add_token_merges(["a b", "ab c"])  # of one, transformers before 5.20 makes a text
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    return _written(writer, path)


def write_part(path: Path, architecture: str, number: int, count: int, total: int, tensors: Mapping[str, Any]) -> Path:
    """Part `number` but the first of `count`, as gguf-split writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    return _written(writer, path)


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    adders: dict[type, Any] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array
    }  # fmt: skip
    adders[type(value)](key, value)
