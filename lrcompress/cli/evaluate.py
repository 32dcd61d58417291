"""lrcompress eval"""

from typing import Annotated

import typer

from lrcompress.cli import options as o

LENGTH, DEFAULT_BLOCKS = 512, 32
DEFAULT_TASK = f"tokens:python-docs@{LENGTH}"
"""What is measured where nothing was asked for, and how much of it."""

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="tokens:SPEC@LENGTH, text:SPEC, tasks:FOLDER_OR_YAML, or an lm-eval task; comma-separated or repeated "
        f"[default: at most {DEFAULT_BLOCKS} blocks of {DEFAULT_TASK}].",
    ),
]


def evaluate(
    model: o.Model,
    tasks: Tasks = None,
    against: Annotated[
        str | None,
        typer.Option(help="A second model beside it, or none [default: what MODEL was made from, if at hand]."),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPR", help='Such as "token_perplexity <= 1.3 * against"; exit code 1 where not met.'),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First N blocks or documents of every task.")] = None,
    batch_size: Annotated[str, typer.Option(help="For lm-eval: a number or auto.")] = "1",
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before every question of lm-eval's.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put lm-eval's questions into the tokenizer's chat template.")
    ] = False,
    compute_dtype: Annotated[str, typer.Option(help="auto is float32 on CPU, the checkpoint's elsewhere.")] = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.Trust = False,
    cache: o.Cache = None,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
) -> None:
    """Measure a model, compressed or not, alone or against another."""
    from lrcompress.cli.show import quiet_libraries, show_evaluation
    from lrcompress.errors import InputError
    from lrcompress.evaluation.gates import parse_expectation
    from lrcompress.evaluation.tasks import parse_tasks
    from lrcompress.recipe import EvaluateSpec, validated

    split = [name for text in tasks or [DEFAULT_TASK] for name in text.split(",") if name]
    limit = limit or (None if tasks else DEFAULT_BLOCKS)
    if not batch_size.isdigit() and batch_size != "auto":
        raise InputError(f"--batch-size {batch_size!r}: a number or auto")
    spec = validated(
        EvaluateSpec,
        {
            "tasks": split, "against": against, "limit": limit, "compute_dtype": compute_dtype,
            "fewshot": fewshot, "chat_template": chat_template,
            "batch_size": batch_size if batch_size == "auto" else int(batch_size),
        },
        "command line",
    )  # fmt: skip
    parse_tasks(split)
    for text in expect or []:
        parse_expectation(text)
    from lrcompress.report.progress import Reporter
    from lrcompress.run import measure

    quiet_libraries()
    o.check_result(json_file)
    reporter = Reporter(quiet=quiet)
    if not tasks:
        from lrcompress.report.progress import duration
        from lrcompress.stages.time_need import reading_seconds

        seconds = reading_seconds(model, (limit or 0) * LENGTH, device, trust_remote_code=trust_remote_code)
        reporter.say(
            f"no --tasks: measuring at most {limit} blocks of {DEFAULT_TASK}, Python's documentation, roughly "
            f"{duration(seconds)} a model; for general text give your own: --tasks YOUR.txt"
        )
    result = measure(model, spec, expect or [], device=device, trust_remote_code=trust_remote_code, reporter=reporter)
    show_evaluation(result, quiet=quiet)
    o.write_result(json_file, result)
    o.exit_unless_met(result["expectations"])
