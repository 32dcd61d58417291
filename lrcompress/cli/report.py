"""lrcompress report"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrcompress.cli import options as o


def report(
    checkpoint: Annotated[str, typer.Argument(help="The folder of a finished checkpoint.", show_default=False)],
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page to write; without it a short report is printed.", show_default=False
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The dense model: adds its spectra, and its text beside the checkpoint's.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt to continue instead of ours; repeatable.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts to continue, one a line.")] = None,
    no_generate: Annotated[bool, typer.Option("--no-generate", help="Load no model to let it write text.")] = False,
    device: o.Device = "auto",
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
) -> None:
    """Tell what a finished checkpoint is and what was measured of it; --html writes one self-contained page."""
    from lrcompress.cli.show import quiet_libraries, show_finished
    from lrcompress.errors import InputError
    from lrcompress.evaluation.generation import PROMPTS, read_prompts, side_by_side
    from lrcompress.foreign.opening import check_model
    from lrcompress.report.finished import read_finished
    from lrcompress.report.page import make_page
    from lrcompress.report.progress import Reporter
    from lrcompress.report.spectra import dense_spectra
    from lrcompress.report.summary import read_report

    if no_generate and (prompt or prompts):
        raise InputError("--no-generate and a prompt were both given: there is nothing to continue it")
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])] or list(PROMPTS)
    if html is not None:
        o.check_writable(html, "--html")
    elif against or prompt or prompts:
        raise InputError("--against and prompts are for the page: name its file with --html FILE")
    folder = check_model(checkpoint)
    if folder is None or not folder.is_dir():
        raise InputError(f"{checkpoint} is no folder: name that of a finished compression")
    finished = read_finished(checkpoint, folder)
    quiet_libraries()
    if html is None:
        show_finished(read_report(folder) or {}, folder, quiet=quiet)
        return
    reporter, spectra, samples = Reporter(quiet=quiet), None, None
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    if against is not None:
        with reporter.phase("singular values", len(finished.targets)) as tick:
            spectra = dense_spectra(against, finished.targets, tick=tick, **options)
    if not no_generate:
        samples = side_by_side(checkpoint, against, finished.model, texts, reporter=reporter, **options)
    o.write_text(html, "--html", make_page(finished, folder, spectra=spectra, samples=samples))
    if not quiet:
        typer.echo(f"wrote {html}")
