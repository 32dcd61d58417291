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
    from lrcompress.report.held_out import times_dense, windows_in_words
    from lrcompress.report.measured import measurements
    from lrcompress.report.summary import bits_stored, load_report

    quiet_libraries()
    out, folder = console(), check_model(model)
    report = load_report(folder) if folder is not None and folder.is_dir() else None
    if report is not None:
        size = f"{report['bytes']['checkpoint'] / 1e6:.4g} MB, {bits_stored(report):.2f} bits a weight"
        out.print(f"{model}: {report['model']} compressed by {report['method']}, {size}")
        if held_out := report.get("held_out"):
            words = f"{times_dense(held_out)} on {windows_in_words(held_out)} of held-out calibration text"
            out.print(f"perplexity × {words}")
        for row in measurements(report.get("evaluation") or {"results": {}}):
            if "perplexity" in row.metric and row.other:
                out.print(f"perplexity × {row.value / row.other:.3f} on {row.measured}")
        out.print(f"measure it: lrcompress eval {model} --tasks YOUR.txt")
        out.print(f"look into it: lrcompress report {model}")
        return
    show_model(overview(make_recipe({"model": model, "method": "auto", "bpw": 4})))
