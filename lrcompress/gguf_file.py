"""compress -o FILE.gguf: a checkpoint of llama.cpp's blocks, and the GGUF file of it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrcompress.errors import InputError
from lrcompress.export.gguf import export_gguf
from lrcompress.foreign.converter import converter_command
from lrcompress.parallel.processes import processes, refuse_several
from lrcompress.pipeline import compress
from lrcompress.recipe import Recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages.naming import output_folder

SUFFIX = ".gguf"


@dataclass
class File:
    """A written GGUF file, its bytes, and the report of the checkpoint that it was made of."""

    path: Path
    bytes: int
    report: dict[str, Any]


def wants_file(recipe: Recipe) -> bool:
    """Whether the recipe's output is a GGUF file."""
    return recipe.output is not None and recipe.output.endswith(SUFFIX)


def compress_to_file(
    recipe: Recipe,
    *,
    keep: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> File:
    """Write the GGUF file that is the recipe's output; it appears whole.

    The checkpoint of the same blocks lies beside it until then, or stays in `keep`, where transformers loads it.
    """
    reporter, file = reporter or Reporter(quiet=True), output_folder(recipe)
    refuse_several("a GGUF file")
    converter = None if recipe.converter is None else Path(recipe.converter)
    converter_command(converter)
    if file.exists() and (file.is_dir() or not overwrite):
        raise InputError(f"output {file} exists: choose another with -o, or pass --overwrite")
    folder = keep or file.with_name(f".{file.name}.blocks")
    recipe = recipe.model_copy(update={"output": str(folder)})
    result = compress(recipe, overwrite=overwrite and keep is not None, resume=resume, reporter=reporter)
    export_gguf(
        str(result.folder), file, converter=converter, overwrite=overwrite,
        trust_remote_code=recipe.trust_remote_code, reporter=reporter,
    )  # fmt: skip
    if keep is None and processes().first:
        shutil.rmtree(result.folder)
    return File(file, file.stat().st_size, result.report)
