"""lrcompress MODEL"""

from typing import Annotated

import typer


def about(model: Annotated[str, typer.Argument(help="A model, or a compressed checkpoint.")]) -> None:
    """Say in a few lines what could be done with a model."""
    from lrcompress.cli.show import console, quiet_libraries
    from lrcompress.foreign.opening import check_model
    from lrcompress.overview import BITS, overview
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
    found = overview(model)
    kinds = ", ".join(f"{kind} {count / 1e6:.4g}" for kind, count in found.numbers.items())
    total = sum(found.numbers.values()) / 1e6
    sizes = ", ".join(f"{found.size(bits) / 1e6:.3g} MB at {bits}" for bits in BITS)
    fits = "fits" if found.bytes < found.free else "does not fit"
    out.print(
        f"{model}: {found.bytes / 1e6:.4g} MB in {found.dtype}, {found.blocks} blocks; it {fits} in the "
        f"{found.free / 1e9:.3g} GB of memory that are free"
    )
    out.print(f"{total:.4g} million weights can be compressed: {kinds}; everything else is {found.other / 1e6:.3g} MB")
    out.print(f"as a checkpoint: {sizes} bits a weight")
    out.print(f"compressing needs {found.needs} (32 samples of 1024 tokens)")
    out.print(f"begin: lrcompress compress {model} --bpw 4 --calibration YOUR.txt")
