"""lrcompress squeeze"""

from pathlib import Path
from typing import Annotated

import typer

from lrcompress.cli import options as o


def squeeze(
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA adapter that PEFT saved.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="Rank of every module.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Fraction of the factors' bytes to remove, in (0, 1).")] = None,
    error: Annotated[
        float | None, typer.Option(help="The smallest adapter with at most this relative error of all updates.")
    ] = None,
    per_module_ranks: o.PerModuleRanks = False,
    randomized: Annotated[
        bool, typer.Option("--randomized", help="Randomised SVD: faster where far fewer components are kept.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Weigh errors by its inputs on calibration text.", rich_help_panel=o.DATA),
    ] = None,
    calibration: o.CalibrationOption = None,
    samples: o.Samples = 32,
    seqlen: o.Seqlen = 1024,
    seed: o.Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output folder [default: ./ADAPTER-squeezed-AMOUNT].")
    ] = None,
    overwrite: o.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show ranks and errors, write nothing.")] = False,
    dtype: o.AdapterDtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.Trust = False,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Write a LoRA adapter as a smaller one: every update truncated to its best approximation."""
    from lrcompress.adapters.inputs import Inputs
    from lrcompress.adapters.squeeze import Amount
    from lrcompress.adapters.squeeze import squeeze as run
    from lrcompress.cli.show import quiet_libraries
    from lrcompress.cli.show_adapters import show_squeeze
    from lrcompress.errors import InputError
    from lrcompress.model.device import resolve_device
    from lrcompress.report.progress import Reporter
    from lrcompress.stages.in_words import errors_in_words
    from lrcompress.stages.request import share_samples

    if base is None and calibration:
        raise InputError("--calibration needs --base MODEL: the text is read by the model that the adapter is for")
    quiet_libraries()
    o.check_result(json_file, output)
    inputs = None
    if base is not None:
        specs = share_samples(calibration or ["python-docs"], samples, seqlen)
        inputs = Inputs(base, specs, seed, device, trust_remote_code)
    with errors_in_words(resolve_device(device), "run again"):
        report = run(
            adapter, output and output.expanduser(), Amount(rank, ratio, error, per_module_ranks),
            inputs=inputs, randomised_seed=seed if randomized else None, dtype=dtype,
            dry_run=dry_run, overwrite=overwrite,
            reporter=Reporter(quiet=quiet),
        )  # fmt: skip
    show_squeeze(report, quiet=quiet, written=not dry_run)
    o.write_result(json_file, report)
