"""The Typer app: commands, errors in one line, exit codes."""

import os
import sys
from typing import Annotated

import typer

from lrcompress.cli import (
    bench,
    cache,
    calibrate,
    compress,
    evaluate,
    export,
    heal,
    inspect,
    merge,
    methods,
    plan,
    report,
    run,
    squeeze,
    sweep,
)
from lrcompress.errors import InputError, LrcompressError
from lrcompress.processes import refuse_several, several

app = typer.Typer(
    name="lrcompress",
    help="Compress language-model checkpoints after training by factorisation, and measure what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress.compress)
app.command("calibrate")(calibrate.calibrate)
app.command("plan")(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("run")(run.run)
app.command("sweep")(sweep.sweep)
app.command("export")(export.export)
app.command("squeeze")(squeeze.squeeze)
app.command("merge")(merge.merge)
app.command("extract")(merge.extract)
app.command("heal")(heal.heal)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.command("cache")(cache.cache)
app.command("methods")(methods.methods)


def _version(asked: bool) -> None:
    if asked:
        from lrcompress import __version__

        typer.echo(f"lrcompress {__version__}")
        raise typer.Exit


SEVERAL = ("compress", "run", "heal")
"""Commands whose work several processes share."""


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    if context.invoked_subcommand not in (None, *SEVERAL):
        refuse_several(context.invoked_subcommand)


def _speaker() -> str:
    """Which of several processes an error is of."""
    return f"[process {os.environ.get('RANK', '0')}] " if several() else ""


def main() -> None:
    """Entry point: exit codes 0 done, 1 expectation failed, 2 bad input, 3 out of a resource, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait slow down everything else that runs on the machine, us included.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except LrcompressError as error:
        sys.stderr.write(f"{_speaker()}error: {' '.join(str(error).split())}\n")
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        sys.stderr.write(f"{_speaker()}error: a path begins with ~ and the name of no user here\n")
        sys.exit(InputError.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
