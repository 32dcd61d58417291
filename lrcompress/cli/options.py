"""Options that several commands share, and what turns them into a recipe."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lrcompress.errors import InputError, ResourceError
from lrcompress.recipe import HOW_MUCH, Recipe, make_recipe, split_assignment

MODEL = "How"
DATA = "Calibration"
OUTPUT = "Output"

Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or demo.", show_default=False)]
Method = Annotated[str, typer.Option(help="Compression method; see `lrcompress methods`.", rich_help_panel=MODEL)]
Ratio = Annotated[
    str | None,
    typer.Option(
        metavar="FRACTION",
        help="How much of the targets' stored bytes to remove: 0.2 or 20%.",
        rich_help_panel=MODEL,
    ),
]
RatioOf = Annotated[
    str,
    typer.Option(
        metavar="bytes|flops|rank",
        help="What --ratio counts: stored bytes, multiply-adds per token, or ranks.",
        rich_help_panel=MODEL,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Bytes of the weight files at most, such as 200MB, instead of a ratio.",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
Bpw = Annotated[
    float | None,
    typer.Option(help="Bits stored for every weight of the targets, instead of a ratio.", rich_help_panel=MODEL),
]
MaxLoss = Annotated[
    str | None,
    typer.Option(
        metavar="PERCENT",
        help="The smallest checkpoint whose perplexity on held-out calibration text rises by at most so much, such as "
        "2%, instead of a ratio.",
        rich_help_panel=MODEL,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(help="eora: one rank for every correction instead of a ratio.", rich_help_panel=MODEL),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC|FOLDER",
        help="What eora corrects: rtn:4:64, gptq:3:64 (bits:group), magnitude:2:4, wanda:2:4, sparsegpt:2:4, "
        "or the folder of a compressed checkpoint of ours, compressed-tensors or GPTQ.",
        rich_help_panel=MODEL,
    ),
]
Refine = Annotated[
    float | None,
    typer.Option(
        metavar="MINUTES",
        help="Train the factors so long against the dense model, on the calibration text; said in the report.",
        rich_help_panel=MODEL,
    ),
]
Allocator = Annotated[
    str | None,
    typer.Option(
        help="How many bytes for which weight: uniform, welore, marginal_error, sensitivity.", rich_help_panel=MODEL
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="Stored format: auto (the smallest that the method finds), low_rank, pivoted; auto: coded by default.",
        rich_help_panel=MODEL,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Method option; repeatable.", rich_help_panel=MODEL),
]
Target = Annotated[
    list[str] | None,
    typer.Option(metavar="PAT", help="Compress only these modules: glob or re:...; repeatable.", rich_help_panel=MODEL),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PAT", help="Leave these modules alone; repeatable.", rich_help_panel=MODEL),
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPEC",
        help="wikitext2, c4, python-docs (default), self, or a file (text, or .jsonl, .json, .csv, .parquet[:field]); "
        "SPEC*WEIGHT for unequal shares; repeatable.",
        rich_help_panel=DATA,
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration blocks in all.", rich_help_panel=DATA)]
Seqlen = Annotated[int, typer.Option(min=8, help="Tokens per calibration block.", rich_help_panel=DATA)]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.", rich_help_panel=DATA)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a non-empty output folder.", rich_help_panel=OUTPUT)
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=OUTPUT)]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Refuse to begin where more resident memory is predicted to be needed, such as 4GB.",
        rich_help_panel=OUTPUT,
    ),
]


def _use_cache(folder: Path | None) -> Path | None:
    """Through the environment, where the libraries of ours that read it, and processes of ours, find it."""
    if folder is not None:
        try:
            wrong = folder.exists() and not folder.is_dir()
            os.environ["LRCOMPRESS_CACHE"] = str(folder.expanduser().absolute())
        except (OSError, RuntimeError) as error:
            raise InputError(f"--cache {str(folder)[:80]} cannot be used ({error})") from error
        if wrong:
            raise InputError(f"--cache {folder} is no folder")
    return folder


Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", callback=_use_cache, rich_help_panel=OUTPUT,
        help="Keeps conversions and evaluations between runs [default: LRCOMPRESS_CACHE or ~/.cache/lrcompress], "
        "and in a named folder also calibration statistics, which are large.",
    ),
]  # fmt: skip
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.", rich_help_panel=OUTPUT)]
Dtype = Annotated[str, typer.Option(help="Dtype to write: auto, float32, bfloat16, float16.", rich_help_panel=OUTPUT)]
PerModuleRanks = Annotated[
    bool,
    typer.Option("--per-module-ranks", help="Every module a rank of its own: a smaller adapter, which PEFT reads."),
]
AdapterDtype = Annotated[
    str, typer.Option("--dtype", help="Of the adapter's numbers: auto (as they are), float32, bfloat16.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.", rich_help_panel=OUTPUT)
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.", rich_help_panel=OUTPUT)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail.", rich_help_panel=OUTPUT)]


def recipe_from_flags(
    *,
    model: str,
    method: str,
    ratio: str | None,
    settings: list[str] | None,
    calibration: list[str] | None,
    samples: int,
    seqlen: int,
    **rest: Any,
) -> Recipe:
    """The recipe that a command line means."""
    from lrcompress.budget import check_ratio, parse_fraction
    from lrcompress.stages.request import share_samples

    if ratio is not None:
        rest["ratio"] = check_ratio(parse_fraction(ratio))
    options = dict(split_assignment(text) for text in settings or [])
    if "name" in options:
        raise InputError("--set name=...: the method is chosen with --method")
    specs = share_samples(calibration or ["python-docs"], samples, seqlen)
    data = {key: value for key, value in rest.items() if value is not None}
    if not data.keys() & {"ratio", "bpw", "size", "max_loss", "rank", "type"}:
        raise InputError(f"{HOW_MUCH}; lrcompress plan {model} shows what each size would give")
    calibrations = [spec.model_dump() for spec in specs]
    return make_recipe(
        {"model": model, "method": {"name": method, **options}, "calibration": calibrations, **data},
        "command line",
    )


def write_result(path: Path | None, data: Any) -> None:
    """--json FILE; `-` is standard output."""
    import json

    if path is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    if str(path) == "-":
        typer.echo(text, nl=False)
        return
    write_text(path, "--json", text)


def check_result(path: Path | None, output: Path | None = None, option: str = "--json") -> None:
    """As check_writable, for an option such as --json FILE where one is given."""
    if path is not None and str(path) != "-":
        check_writable(path, option, output)


def check_writable(path: Path, option: str, output: Path | None = None) -> None:
    """InputError where the file that an option names cannot come to be; said before the work that it is for.

    It may lie in the folder `output`, which is still to be made, or in one above it.
    """
    parent = path.absolute().parent
    later = output is not None and parent in (output.absolute(), *output.absolute().parents)
    if path.is_dir() or not (parent.is_dir() or later):
        reason = "it is a folder" if path.is_dir() else "there is no such folder"
        raise InputError(f"{option} {path} cannot be written: {reason}")


def exit_unless_met(expectations: list[dict[str, Any]]) -> None:
    """Exit code 1 where an expectation was missed."""
    if not all(entry["met"] for entry in expectations):
        raise typer.Exit(1)


def write_text(path: Path, option: str, text: str) -> None:
    """Write what an option asked for, whole or not at all; InputError where that is not possible.

    ResourceError where the disk is full.
    """
    from lrcompress.checkpoint.writer import disk_errors

    regular = path.is_file() or not path.exists()  # a device or a pipe is written straight
    target = path.resolve() if regular else path  # a link stays one
    written = target.with_name(f"{target.name}.{os.getpid()}.tmp") if regular else target
    try:
        with disk_errors(path.absolute().parent):
            written.write_text(text, encoding="utf8", errors="replace")
            if regular:
                written.replace(target)
    except (OSError, ResourceError) as error:
        if regular:
            written.unlink(missing_ok=True)
        if isinstance(error, ResourceError):
            raise
        raise InputError(f"{option} {path} cannot be written: {error.strerror}") from error
