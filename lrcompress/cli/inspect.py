"""lrcompress inspect"""

from typing import Annotated

import typer

from lrcompress.cli import options as o


def inspect(
    model: Annotated[str, typer.Argument(help="A model or a compressed checkpoint.", show_default=False)],
    spectra: Annotated[bool, typer.Option("--spectra", help="Also the singular values of the weights.")] = False,
    trust_remote_code: o.Trust = False,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Show what is inside: formats, ranks, bytes, spectra."""
    from lrcompress.cli.show import quiet_libraries, show_inspection
    from lrcompress.report.inspection import inspect_model
    from lrcompress.report.progress import Reporter

    quiet_libraries()
    o.check_result(json_file)
    result = inspect_model(model, spectra=spectra, trust_remote_code=trust_remote_code, reporter=Reporter(quiet=quiet))
    show_inspection(result, quiet=quiet)
    o.write_result(json_file, result)
