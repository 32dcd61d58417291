"""As one GGUF file, through llama.cpp's own converter: multiplied out first, since GGUF knows no factors."""

import tempfile
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.converter import convert, converter_command, find_rows
from lrcompress.checkpoint.opening import short_name
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.errors import InputError
from lrcompress.export.block_file import block_weights, holds_blocks, write_blocks
from lrcompress.export.dense import export_dense
from lrcompress.export.source import open_compressed
from lrcompress.report.progress import Reporter

GGUF_DTYPES = {"auto": "auto", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def export_gguf(
    checkpoint: str,
    output: Path,
    *,
    converter: Path | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write file `output`; it appears whole. `converter` is llama.cpp's convert_hf_to_gguf.py, else that on the PATH.

    InputError where there is no converter, or it fails: its last words are in the message.
    """
    reporter = reporter or Reporter(quiet=True)
    if dtype not in GGUF_DTYPES:
        raise InputError(f"--dtype {dtype} is unknown: use one of {', '.join(GGUF_DTYPES)}")
    command = converter_command(converter)
    if output.exists() and (output.is_dir() or not overwrite):
        cure = "name a file with -o" if output.is_dir() else "choose another with -o, or pass --overwrite"
        raise InputError(f"output {output} exists: {cure}")
    try:
        with disk_errors(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {output} cannot be written ({error.strerror}): choose another -o") from error
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        source = open_compressed(checkpoint)
        named = short_name(str((source.report or {}).get("model") or checkpoint))  # the converter names the model so
        dense, partial = Path(scratch) / "dense" / named, Path(scratch) / "model.gguf"
        found = export_dense(checkpoint, dense, trust_remote_code=trust_remote_code, reporter=reporter)
        reporter.say(f"converting with {' '.join(command)}")
        convert(command, dense, partial, GGUF_DTYPES[dtype], checkpoint)
        if holds_blocks(source):
            weights = block_weights(source)
            code = trust_remote_code
            names = find_rows(command, dense, weights, Path(scratch), code=code, label=checkpoint)
            write_blocks(source, partial, names, Path(scratch) / "blocks.gguf")
            partial = Path(scratch) / "blocks.gguf"
        partial.replace(output)
    return {**found, "to": "gguf", "output": str(output), "bytes": {"checkpoint": output.stat().st_size}}
