"""lrcompress plan"""

from typing import Annotated

import typer

from lrcompress.cli import options as o

ANY = 4.0
"""Bits in the recipe of a plan for which no amount was asked: all are tried."""


def plan(
    model: o.Model,
    method: o.Method = "auto",
    ratio: o.Ratio = None,
    ratio_of: o.RatioOf = "bytes",
    bpw: o.Bpw = None,
    size: o.Size = None,
    max_loss: o.MaxLoss = None,
    rank: o.Rank = None,
    base: o.Base = None,
    settings: o.Set = None,
    allocator: o.Allocator = None,
    format: o.Format = None,
    target: o.Target = None,
    ignore: o.Ignore = None,
    calibration: o.CalibrationOption = None,
    samples: o.Samples = 32,
    seqlen: o.Seqlen = 1024,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    memory: o.Memory = None,
    nodes: Annotated[
        int, typer.Option(help="Machines that torchrun would start processes on.", rich_help_panel=o.OUTPUT)
    ] = 1,
    devices: Annotated[
        int, typer.Option(help="Processes on each of them, a device each.", rich_help_panel=o.OUTPUT)
    ] = 1,
    trust_remote_code: o.Trust = False,
    cache: o.Cache = None,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Show what would be stored where, without writing a checkpoint; without an amount, what every size would give."""
    amounts = (ratio, bpw, size, max_loss, rank)
    choosing = all(amount is None for amount in amounts) and nodes * devices == 1
    recipe = o.recipe_from_flags(
        model=model, method=method, ratio=ratio, ratio_of=ratio_of, bpw=ANY if choosing else bpw, size=size,
        max_loss=max_loss, rank=rank,
        base=base, settings=settings, calibration=calibration,
        samples=samples, seqlen=seqlen, allocator=allocator, format=format, target=target or [],
        ignore=ignore or [], seed=seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        memory=memory,
    )  # fmt: skip
    from lrcompress.cli.show import quiet_libraries
    from lrcompress.cli.show_plan import show_choices, show_plan
    from lrcompress.overview import overview
    from lrcompress.pipeline import make_plan
    from lrcompress.report.progress import Reporter

    quiet_libraries()
    o.check_result(json_file)
    reporter = Reporter(quiet=quiet, verbose=verbose)
    if choosing:
        found = overview(recipe, predict="kept" if calibration is None else "yes", in_use=True, reporter=reporter)
        show_choices(found, quiet=quiet)
        o.write_result(json_file, found.as_json())
        return
    result = make_plan(recipe, nodes=nodes, devices=devices, reporter=reporter)
    show_plan(result, quiet=quiet)
    o.write_result(json_file, result)
