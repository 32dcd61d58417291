"""lrcompress MODEL"""

from typing import Annotated

import typer


def about(model: Annotated[str, typer.Argument(help="A model, or a compressed checkpoint.")]) -> None:
    """Say in a few lines what could be done with a model."""
    from lrcompress.cli.show import console, quiet_libraries
    from lrcompress.cli.show_plan import show_model
    from lrcompress.foreign.opening import check_model
    from lrcompress.overview import overview
    from lrcompress.recipe import make_recipe
    from lrcompress.report.summary import bits_stored, load_report

    quiet_libraries()
    out, folder = console(), check_model(model)
    report = load_report(folder) if folder is not None and folder.is_dir() else None
    if report is not None:
        size = f"{report['bytes']['checkpoint'] / 1e6:.4g} MB, {bits_stored(report):.2f} bits a weight"
        out.print(f"{model}: {report['model']} compressed by {report['method']}, {size}")
        out.print(f"measure it: lrcompress eval {model} --tasks YOUR.txt")
        out.print(f"look into it: lrcompress inspect {model}")
        return
    show_model(overview(make_recipe({"model": model, "method": "auto", "bpw": 4})))
