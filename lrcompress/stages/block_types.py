"""Which block type every weight gets where a GGUF file type was asked for."""

import json
from pathlib import Path

from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.foreign.converter import Converted, Weight, converter_command, find_rows
from lrcompress.ggml.file_types import OTHERS, types_of
from lrcompress.ggml.imatrix import read_imatrix
from lrcompress.ggml.types import BLOCK_TYPES
from lrcompress.methods.ggml import GgmlBlocks
from lrcompress.parallel.processes import processes
from lrcompress.report.progress import Reporter
from lrcompress.stages.amount import budget_of
from lrcompress.stages.opened import Opened
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
        command = converter_command(None if recipe.converter is None else Path(recipe.converter))
        reporter.say(f"asking {Path(command[-1]).name} for the names and the order of the weights' rows")
        code = recipe.trust_remote_code
        found = find_rows(command, opened.model.folder, dense_weights(opened), scratch, code=code, label=recipe.model)
        tensors = {site: tensor for tensor, rows in found.rows.items() for site in set(rows.site)}
        types = None if recipe.type is None else _types_of_sites(recipe.type, found)
        write_json(path, {"types": types, "tensors": tensors, "beside": found.bytes_beside(OTHERS)})
    processes().wait()
    read = json.loads(path.read_text())
    method.types, method.beside = read["types"], read["beside"]
    if method.options.imatrix is not None:
        method.importance = _importance(opened, Path(method.options.imatrix), read["tensors"], reporter)
    known = read["tensors"] if method.types is None else method.types
    method.left = left = [site.name for site in opened.sites if site.name not in known]
    if len(left) == len(opened.sites):
        raise InputError(f"no weight of {recipe.model} is one of llama.cpp's, row by row: write a folder (-o DIR)")
    if left:
        reporter.warn(
            f"{len(left)} weights, {left[0]} first, are no rows of what llama.cpp's converter writes, or fit no "
            "block: they are rounded by their own numbers, or get 16 bits"
        )
    if recipe.type is None:
        budget_of(opened, opened.costs())


def _importance(opened: Opened, path: Path, tensors: dict[str, str], reporter: Reporter) -> dict[str, Tensor]:
    """Mean squares (in,) of the inputs of the sites that the imatrix knows, by the GGUF tensors that hold them."""
    matrix, found = read_imatrix(path), {}
    for site in opened.sites:
        known = matrix.get(tensors.get(site.name, ""))
        if known is None:
            continue
        means = known.means()
        if means.shape != (1, site.shape[1]):
            raise InputError(
                f"imatrix {path} has {means.numel()} numbers for {tensors[site.name]}, not {site.shape[1]}: it is of "
                "another model, make its own with lrcompress calibrate --imatrix"
            )
        found[site.name] = means[0]
    if not found:
        raise InputError(
            f"imatrix {path} knows none of the model's weights: make its own with lrcompress calibrate --imatrix"
        )
    if len(found) < len(opened.sites):
        reporter.warn(
            f"imatrix {path} says nothing of {len(opened.sites) - len(found)} weights: all inputs count alike"
        )
    return found


def dense_weights(opened: Opened) -> dict[str, Weight]:
    """The weights of the sites as they lie in the dense checkpoint, those that lie there by themselves."""
    keys = {site: opened.walker.names.get(f"{site.name}.weight") for site in opened.sites}
    stored = set(opened.reader.names()) - set(opened.reader.made())
    return {site.name: Weight(key, site.conv1d) for site, key in keys.items() if key is not None and key in stored}


def _types_of_sites(file_type: str, found: Converted) -> dict[str, str]:
    types = types_of(file_type, found.shapes, found.model)
    pairs = ((site, types[tensor]) for site, tensor in found.tensor_of().items())
    return {site: kind for site, kind in pairs if kind in BLOCK_TYPES}
