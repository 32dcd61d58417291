"""lrcompress calibrate"""

from pathlib import Path
from typing import Annotated

import typer

from lrcompress.cli import options as o


def calibrate(
    model: o.Model,
    imatrix: Annotated[
        Path,
        typer.Option(metavar="FILE.gguf", help="Write llama.cpp's importance matrix, for llama-quantize --imatrix."),
    ],
    calibration: o.CalibrationOption = None,
    samples: o.Samples = 32,
    seqlen: o.Seqlen = 1024,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    converter: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py [default: that on the PATH]."),
    ] = None,
    trust_remote_code: o.Trust = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at FILE.")] = False,
    quiet: o.Quiet = False,
) -> None:
    """Sum up what a model's weights read on a text."""
    from lrcompress.cli.show import console, quiet_libraries
    from lrcompress.errors import InputError
    from lrcompress.imatrix import calibrate_imatrix
    from lrcompress.report.progress import Reporter

    quiet_libraries()
    o.check_writable(imatrix, "--imatrix")
    if imatrix.exists() and not overwrite:
        raise InputError(f"--imatrix {imatrix} exists: choose another, or pass --overwrite")
    recipe = o.recipe_from_flags(
        model=model, method="ggml", ratio=None, settings=["metric=input", "sink_share=0.0"], calibration=calibration,
        samples=samples, seqlen=seqlen, seed=seed, device=device, type="Q8_0", trust_remote_code=trust_remote_code,
        converter=None if converter is None else str(converter),
    )  # fmt: skip
    count = calibrate_imatrix(recipe, imatrix, reporter=Reporter(quiet=quiet))
    if not quiet:
        console().print(f"wrote {imatrix}: {count} tensors")
