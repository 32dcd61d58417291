"""As a GGUF file, through llama.cpp's own converter: integers in its blocks, corrections as a LoRA file beside it."""

import tempfile
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.errors import InputError
from lrcompress.export.block_file import block_weights, holds_blocks, write_blocks
from lrcompress.export.dense import export_dense
from lrcompress.export.native_blocks import NativeBlocks
from lrcompress.export.source import open_compressed
from lrcompress.foreign.converter import Weight, convert, converter_command, find_rows
from lrcompress.foreign.opening import short_name
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
    """Write file `output`, which appears whole, and `OUTPUT-lora.gguf` where there are corrections.

    Quantized weights keep their numbers where a block type holds them, every other compressed one becomes Q8_0 and the
    loss is measured; `dtype` is the rest's. `converter` is llama.cpp's convert_hf_to_gguf.py, else that on the PATH.
    InputError where there is no converter, or it fails: its last words are in the message.
    """
    reporter = reporter or Reporter(quiet=True)
    if dtype not in GGUF_DTYPES:
        raise InputError(f"--dtype {dtype} is unknown: use one of {', '.join(GGUF_DTYPES)}")
    command = converter_command(converter)
    lora = output.with_name(f"{output.stem}-lora.gguf")
    for path in (output, lora):
        if path.exists() and (path.is_dir() or not overwrite):
            cure = "name a file with -o" if path.is_dir() else "choose another with -o, or pass --overwrite"
            raise InputError(f"output {path} exists: {cure}")
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
            more: dict[str, Any] = {}
        else:
            weights = {name: Weight(f"{name}.weight", spec.conv1d) for name, spec in source.manifest.modules.items()}
            held = {name: weight for name, weight in weights.items() if weight.name in CheckpointReader(dense).names()}
            names = find_rows(command, dense, held, Path(scratch), code=trust_remote_code, label=checkpoint)
            native = NativeBlocks(source, partial, names)
            partial = native.write(Path(scratch) / "blocks.gguf")
            more = native.measured(checkpoint, trust_remote_code=trust_remote_code)
            if native.corrected:
                native.write_lora(Path(scratch) / "lora.gguf")
                (Path(scratch) / "lora.gguf").replace(lora)
                more |= {"lora": str(lora)}
        partial.replace(output)
    sizes = {"checkpoint": output.stat().st_size, **({"lora": lora.stat().st_size} if "lora" in more else {})}
    return {**found, **more, "to": "gguf", "output": str(output), "bytes": sizes}
