"""The Typer app: commands, errors in one line, exit codes."""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lrcompress.cli import (
    about,
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
from lrcompress.errors import InputError, LrcompressError, did_you_mean
from lrcompress.parallel.processes import refuse_several, several


class _Commands(TyperGroup):
    """`lrcompress MODEL` says what could be done with MODEL."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and _names_model(args[0]):
            args = ["about", *args]
        elif args[0] not in self.commands:
            known = [name for name, command in self.commands.items() if not command.hidden]
            ctx.fail(f"No such command {args[0]!r}. {did_you_mean(args[0], [*known, 'demo']).capitalize()}".rstrip())
        return super().resolve_command(ctx, args)


def _names_model(text: str) -> bool:
    return text == "demo" or "/" in text or os.path.exists(text)  # of an impossible name Path would raise


app = typer.Typer(
    name="lrcompress",
    cls=_Commands,
    help="Compress language-model checkpoints after training, and measure what it cost. "
    "`lrcompress MODEL` says what could be done with a model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("about", hidden=True)(about.about)
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
