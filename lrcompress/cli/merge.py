"""lrcompress merge and lrcompress extract"""

from pathlib import Path
from typing import Annotated

import typer

from lrcompress.cli import options as o

Output = Annotated[Path, typer.Option("--output", "-o", help="Output folder.", show_default=False)]


def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="LoRA adapters, or checkpoints of ours, of one base.", show_default=False)
    ],
    output: Output,
    basis: Annotated[int | None, typer.Option(help="Elements of every module's basis, below the tasks.")] = None,
    size: Annotated[str | None, typer.Option(metavar="SIZE", help="Bytes of the whole at most, such as 5MB.")] = None,
    error: Annotated[float | None, typer.Option(help="The smallest basis with at most this relative error.")] = None,
    overwrite: o.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show bytes and errors, write nothing.")] = False,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Hold several adapters, or low-rank checkpoints of ours, as a smaller basis and coefficients."""
    from lrcompress.adapters.merge import Room
    from lrcompress.adapters.merge import merge as run
    from lrcompress.cli.show import quiet_libraries
    from lrcompress.cli.show_adapters import show_merge
    from lrcompress.report.progress import Reporter

    quiet_libraries()
    o.check_result(json_file, output.expanduser())
    report = run(
        adapters, output.expanduser(), Room(basis, size, error),
        dry_run=dry_run, overwrite=overwrite, reporter=Reporter(quiet=quiet),
    )  # fmt: skip
    show_merge(report, quiet=quiet, written=not dry_run)
    o.write_result(json_file, report)


def extract(
    shared: Annotated[str, typer.Argument(help="A folder that merge wrote.", show_default=False)],
    task: Annotated[str, typer.Option(help="The task's name: that of its adapter's folder.", show_default=False)],
    output: Output,
    per_module_ranks: o.PerModuleRanks = False,
    dtype: o.AdapterDtype = "auto",
    overwrite: o.Overwrite = False,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Write one task of a shared basis as what it was: an adapter that PEFT loads, or a checkpoint."""
    from lrcompress.adapters.extract import extract as run
    from lrcompress.cli.show import console, quiet_libraries

    quiet_libraries()
    o.check_result(json_file, output.expanduser())
    result = run(
        shared, task, output.expanduser(), per_module_ranks=per_module_ranks, dtype=dtype, overwrite=overwrite,
    )  # fmt: skip
    if not quiet:
        first, last = result["ranks"]
        console().print(
            f"{result['modules']} modules of ranks {first} to {last}, {result['bytes'] / 1e6:.3f} MB; relative error "
            f"{result['relative_error']:.4f}\nwrote {result['output']}"
        )
    o.write_result(json_file, result)
