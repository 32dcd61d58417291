"""lrcompress bench"""

from typing import Annotated

import typer

from lrcompress.cli import options as o


def bench(
    model: o.Model,
    against: Annotated[str | None, typer.Option(help="The dense model, measured by turns with it.")] = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1,8",
    context: Annotated[str, typer.Option(metavar="N,...", help="Tokens read before the first new one.")] = "128,512",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after the first.")] = 32,
    repeats: Annotated[int, typer.Option(min=2, help="Repetitions whose median and spread count.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile", help="Run both models through torch.compile.")] = False,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPR",
            help='Such as "decode_speedup >= 1.0" (the slowest row counts), prefill_speedup, "bytes <= 200MB", '
            "rss_bytes, load_seconds; exit code 1 where not met.",
        ),
    ] = None,
    compute_dtype: Annotated[str, typer.Option(help="auto is float32 on CPU, the checkpoint's elsewhere.")] = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.Trust = False,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Measure tokens per second, load time, memory and bytes of a model, alone or by turns with the dense one."""
    from lrcompress.cli.show import quiet_libraries
    from lrcompress.cli.show_bench import show_bench

    batches, contexts = _numbers("--batch", batch), _numbers("--context", context)
    o.check_result(json_file)
    from lrcompress.evaluation.bench import BenchSpec
    from lrcompress.evaluation.bench import bench as run_bench
    from lrcompress.report.progress import Reporter

    quiet_libraries()
    result = run_bench(
        model, BenchSpec(batches, contexts, new_tokens, repeats, compiled), against, expect or [],
        device=device, dtype=compute_dtype, trust_remote_code=trust_remote_code, reporter=Reporter(quiet=quiet),
    )  # fmt: skip
    show_bench(result, quiet=quiet)
    o.write_result(json_file, result)
    o.exit_unless_met(result["expectations"])


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers from 1 of a list with commas."""
    from lrcompress.errors import InputError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"{option} {text!r}: whole numbers from 1, separated by commas")
    return tuple(dict.fromkeys(int(part) for part in parts))
