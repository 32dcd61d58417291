"""lrcompress export"""

from pathlib import Path
from typing import Annotated

import typer

from lrcompress.cli import options as o


def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint that compress wrote.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="SHAPE",
            help="dense: an ordinary checkpoint, as large as before; peft: eora's corrections as a LoRA adapter, "
            "and the base beside it.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output folder [default: ./CHECKPOINT-SHAPE].")
    ] = None,
    dtype: Annotated[str, typer.Option(help="dense: auto (the checkpoint's), float32, bfloat16, float16.")] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest shard, such as 5GB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty output folder.")] = False,
    trust_remote_code: o.Trust = False,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Write a compressed checkpoint in the shape that other tools read."""
    from lrcompress.checkpoint.opening import short_name
    from lrcompress.cli.show import quiet_libraries, show_export
    from lrcompress.errors import InputError, nearest
    from lrcompress.export.dense import export_dense
    from lrcompress.export.peft import export_peft
    from lrcompress.report.progress import Reporter

    if to not in ("dense", "peft"):
        raise InputError(f"--to {to!r} is unknown: {nearest(to, ['dense', 'peft'])}")
    if to == "peft" and dtype != "auto":
        raise InputError(f"--dtype {dtype} is for --to dense: an adapter and its base keep the checkpoint's numbers")
    quiet_libraries()
    folder = (output or Path(f"{short_name(checkpoint)}-{to}")).expanduser()
    reporter = Reporter(quiet=quiet)
    if to == "peft":
        result = export_peft(checkpoint, folder, shard_size=shard_size, overwrite=overwrite, reporter=reporter)
    else:
        result = export_dense(
            checkpoint, folder, dtype=dtype, shard_size=shard_size, overwrite=overwrite,
            trust_remote_code=trust_remote_code, reporter=reporter,
        )  # fmt: skip
    show_export(result, quiet=quiet)
    o.write_result(json_file, result)
