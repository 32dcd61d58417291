"""lrcompress compress"""

import os
from pathlib import Path
from typing import Annotated

import typer

from lrcompress.cli import options as o


def compress(
    model: o.Model,
    method: o.Method = "auto",
    ratio: o.Ratio = None,
    ratio_of: o.RatioOf = "bytes",
    bpw: o.Bpw = None,
    size: o.Size = None,
    max_loss: o.MaxLoss = None,
    rank: o.Rank = None,
    type: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With -o FILE.gguf: llama.cpp's file type whose blocks the weights get, such as Q4_K_M.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With -o FILE.gguf: llama.cpp's convert_hf_to_gguf.py [default: that on the PATH].",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --type: weigh errors by llama.cpp's importance matrix (.gguf or .dat), not by a text.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With -o FILE.gguf: keep a checkpoint of the same blocks.", rich_help_panel=o.OUTPUT
        ),
    ] = None,
    base: o.Base = None,
    refine: o.Refine = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Output folder [default: ./MODEL-METHOD[-BASE]-AMOUNT].", rich_help_panel=o.OUTPUT
        ),
    ] = None,
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
    shard_size: Annotated[str, typer.Option(help="Largest shard, such as 5GB.", rich_help_panel=o.OUTPUT)] = "5GB",
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the needs, write nothing.", rich_help_panel=o.OUTPUT)
    ] = False,
    save_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write these options as a recipe.", rich_help_panel=o.OUTPUT)
    ] = None,
    memory: o.Memory = None,
    trust_remote_code: o.Trust = False,
    cache: o.Cache = None,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compress a checkpoint and write one that transformers loads."""
    from lrcompress.errors import InputError

    file = output is not None and output.endswith(".gguf")
    if (type is not None or file) and method == "auto":
        method = "ggml"
    if imatrix is not None:
        settings = [*(settings or []), f"imatrix={imatrix}"]
    if file and type is None and bpw is None and size is None:
        raise InputError(f"output {output} is a GGUF file: say which --type, such as Q4_K_M, or give a --bpw or --size")
    recipe = o.recipe_from_flags(
        model=model, method=method, ratio=ratio, ratio_of=ratio_of, bpw=bpw, size=size, max_loss=max_loss,
        rank=rank, type=type, converter=None if converter is None else str(converter),
        base=base, refine=refine, settings=settings, calibration=calibration,
        samples=samples, seqlen=seqlen, output=output, allocator=allocator, format=format, target=target or [],
        ignore=ignore or [], seed=seed, device=device, dtype=dtype, shard_size=shard_size,
        trust_remote_code=trust_remote_code,
        memory=memory,
    )  # fmt: skip
    from lrcompress.cli.show import quiet_libraries, show_report
    from lrcompress.cli.show_plan import show_plan
    from lrcompress.gguf_file import compress_to_file, wants_file
    from lrcompress.parallel.processes import processes, refuse_several
    from lrcompress.pipeline import compress as run_compress
    from lrcompress.pipeline import make_plan
    from lrcompress.recipe import dump_recipe
    from lrcompress.report.progress import Reporter
    from lrcompress.stages.naming import output_folder

    quiet_libraries()
    reporter = Reporter(quiet=quiet, verbose=verbose)
    o.check_result(json_file, output_folder(recipe))
    if keep is not None and not wants_file(recipe):
        raise InputError(f"--keep {keep} is for -o FILE.gguf: name a folder with -o")
    if dry_run:
        refuse_several("a plan")
    if save_recipe is not None:
        o.check_writable(save_recipe, "--save-recipe")
        if int(os.environ.get("RANK", "0")) == 0:
            o.write_text(save_recipe, "--save-recipe", dump_recipe(recipe))
    if dry_run:
        plan = make_plan(recipe, reporter=reporter)
        show_plan(plan, quiet=quiet)
        o.write_result(json_file, plan)
        return
    if wants_file(recipe):
        made = compress_to_file(recipe, keep=keep, overwrite=overwrite, resume=resume, reporter=reporter)
        show_report(made.report, made.path, quiet=quiet)
        o.write_result(json_file, {**made.report, "file": {"path": str(made.path), "bytes": made.bytes}})
        return
    result = run_compress(recipe, overwrite=overwrite, resume=resume, reporter=reporter)
    if not processes().first:
        return
    show_report(result.report, result.folder, quiet=quiet)
    o.write_result(json_file, result.report)
