"""lrcompress export"""

from pathlib import Path
from typing import Annotated

import typer

from lrcompress.cli import options as o


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint that compress wrote; --to dense: also a .gguf file, or demo.", show_default=False
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="SHAPE",
            help="dense: an ordinary checkpoint, as large as before; peft: eora's corrections as a LoRA adapter, "
            "and the base beside it; compressed-tensors: integers that vLLM and transformers read; gguf: one file for "
            "llama.cpp, through its converter.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Output folder, or file [default: ./CHECKPOINT-SHAPE or CHECKPOINT.gguf]."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="auto, float32, bfloat16, float16; of an adapter all but float16, its base stays as it is."),
    ] = "auto",
    per_module_ranks: o.PerModuleRanks = False,
    shard_size: Annotated[str, typer.Option(help="Largest shard, such as 5GB.")] = "5GB",
    converter: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="gguf: llama.cpp's convert_hf_to_gguf.py [default: that on the PATH]."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    trust_remote_code: o.Trust = False,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Write a compressed checkpoint in the shape that other tools read; or a .gguf file as a dense folder."""
    from lrcompress.cli.show import quiet_libraries, show_export
    from lrcompress.errors import InputError, nearest
    from lrcompress.export.compressed_tensors import export_compressed_tensors
    from lrcompress.export.dense import export_dense
    from lrcompress.export.gguf import export_gguf
    from lrcompress.export.peft import export_peft
    from lrcompress.foreign.opening import short_name
    from lrcompress.report.progress import Reporter

    if to not in (shapes := ["dense", "peft", "compressed-tensors", "gguf"]):
        raise InputError(f"--to {to!r} is unknown: {nearest(to, shapes)}")
    if per_module_ranks and to != "peft":
        raise InputError(f"--per-module-ranks is for --to peft, not for --to {to}: leave it out")
    if to != "gguf" and converter is not None:
        raise InputError(f"--converter is for --to gguf, not for --to {to}: leave it out")
    quiet_libraries()
    name = short_name(checkpoint)
    folder = (output or Path(f"{name}.gguf" if to == "gguf" else f"{name}-{to}")).expanduser()
    o.check_result(json_file, folder)
    reporter = Reporter(quiet=quiet)
    if to == "gguf":
        result = export_gguf(
            checkpoint, folder, converter=converter, dtype=dtype, overwrite=overwrite,
            trust_remote_code=trust_remote_code, reporter=reporter,
        )  # fmt: skip
    elif to == "compressed-tensors":
        result = export_compressed_tensors(
            checkpoint, folder, dtype=dtype, shard_size=shard_size, overwrite=overwrite,
            trust_remote_code=trust_remote_code, reporter=reporter,
        )  # fmt: skip
    elif to == "peft":
        result = export_peft(
            checkpoint, folder, dtype=dtype, per_module_ranks=per_module_ranks, shard_size=shard_size,
            overwrite=overwrite, trust_remote_code=trust_remote_code, reporter=reporter,
        )  # fmt: skip
    else:
        result = export_dense(
            checkpoint, folder, dtype=dtype, shard_size=shard_size, overwrite=overwrite,
            trust_remote_code=trust_remote_code, reporter=reporter,
        )  # fmt: skip
    show_export(result, quiet=quiet)
    o.write_result(json_file, result)
