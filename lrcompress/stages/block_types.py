"""Which block type every weight gets where a GGUF file type was asked for."""

import json
from pathlib import Path

from lrcompress.checkpoint.converter import Converted, Weight, converter_command, find_rows
from lrcompress.errors import InputError
from lrcompress.ggml.file_types import types_of
from lrcompress.ggml.types import BLOCK_TYPES
from lrcompress.methods.ggml import GgmlBlocks
from lrcompress.processes import processes
from lrcompress.report.progress import Reporter
from lrcompress.stages.prepare import Opened
from lrcompress.stages.workspace import write_json


def find_block_types(opened: Opened, scratch: Path, reporter: Reporter) -> None:
    """Tell the method the block type of every site, by llama-quantize's rules for the names that the converter gives.

    They are kept in `scratch`, so that a resumed run converts nothing again. InputError where no weight gets any.
    """
    method, recipe = opened.request.method, opened.request.recipe
    if not isinstance(method, GgmlBlocks):
        return
    path = scratch / "block-types.json"
    if not path.exists() and processes().first:
        assert recipe.type is not None
        command = converter_command(None if recipe.converter is None else Path(recipe.converter))
        reporter.say(f"asking {Path(command[-1]).name} for the names and the order of the weights' rows")
        code = recipe.trust_remote_code
        found = find_rows(command, opened.model.folder, _weights(opened), scratch, code=code, label=recipe.model)
        write_json(path, _types_of_sites(recipe.type, found))
    processes().wait()
    method.types = json.loads(path.read_text())
    left = [site.name for site in opened.sites if site.name not in method.types]
    if len(left) == len(opened.sites):
        raise InputError(f"--type {recipe.type}: no weight of {recipe.model} is one of llama.cpp's, row by row")
    if left:
        reporter.warn(
            f"{len(left)} weights, {left[0]} first, are no rows of what llama.cpp's converter writes, or fit no "
            "block: they are rounded by their own numbers, without any text"
        )


def _weights(opened: Opened) -> dict[str, Weight]:
    keys = {site: opened.walker.names.get(f"{site.name}.weight") for site in opened.sites}
    stored = set(opened.reader.names()) - set(opened.reader.made())
    return {site.name: Weight(key, site.conv1d) for site, key in keys.items() if key is not None and key in stored}


def _types_of_sites(file_type: str, found: Converted) -> dict[str, str]:
    types = types_of(file_type, found.shapes, found.model)
    pairs = ((site, types[tensor]) for site, tensor in found.tensor_of().items())
    return {site: kind for site, kind in pairs if kind in BLOCK_TYPES}
