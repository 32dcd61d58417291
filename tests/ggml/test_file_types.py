"""Which block type each tensor of a file gets, against what llama.cpp itself gave the tensors of small files."""

import json
from pathlib import Path

import gguf
import pytest

from lrcompress.ggml.file_types import FILE_TYPES, Model, Shape, types_of

RECORDED = json.loads(Path(__file__).with_name("file_types.json").read_text())
"""From llama_model_quantize (b11739) with an importance matrix: by model, its axes of tensors, and a file type's types.

A place stands for the tensors of all layers, with a type for each where they differ.
"""
COLUMNS = 256
OUTSIDE = ("token_embd.weight", "output.weight")


def shapes_of(model: dict[str, int], places: list[str]) -> list[Shape]:
    found = []
    for place in places:
        axes = (model["experts"], 32, COLUMNS) if "_exps" in place else (32, COLUMNS)
        layers = [f"blk.{block}.{place}" for block in range(model["layers"])]
        found += [Shape(name, axes) for name in ([place] if place in OUTSIDE else layers)]
    return found


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_types_are_llama_cpps(name: str, file_type: str) -> None:
    model, expected = RECORDED[name]["model"], RECORDED[name]["types"][file_type]
    found = types_of(
        file_type,
        shapes_of(model, list(expected)),
        Model(model["layers"], model["heads"] // model["kv"], model["experts"]),
    )
    for place, kinds in expected.items():
        if place in OUTSIDE:
            assert found[place] == kinds
            continue
        layers = [found[f"blk.{block}.{place}"] for block in range(model["layers"])]
        assert layers == ([kinds] * len(layers) if isinstance(kinds, str) else kinds), place


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_numbers_of_file_types_are_ggufs(file_type: str) -> None:
    number = FILE_TYPES[file_type][0]
    assert gguf.LlamaFileType(number).name.removeprefix("MOSTLY_") == file_type
