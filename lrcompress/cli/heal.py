"""lrcompress heal"""

from pathlib import Path
from typing import Annotated

import typer

from lrcompress.cli import options as o

HOW = "Training"


def heal(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a compressed checkpoint.", show_default=False)],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="As --calibration of compress, or FILE.jsonl:PROMPT,ANSWER, trained on the answers only; repeatable "
            "[default: python-docs].",
            rich_help_panel=HOW,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Output folder [default: ./CHECKPOINT-healed].", rich_help_panel=o.OUTPUT),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="scales: of integer codes, with corrections and norms; factors: of every weight; lrc: of those that "
            "lost half of their rank or more; singular-values; principal: the largest 5% of the dense weights' "
            "entries; norms; all: everything [default: scales where there are integer codes, else lrc, else factors].",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = "auto",
    optimizer: Annotated[
        str, typer.Option(metavar="adamw|lora-pro|scaled", help="How factors move.", rich_help_panel=HOW)
    ] = "adamw",
    distill: Annotated[
        str,
        typer.Option(
            metavar="none|logits|features",
            help="Learn from the text, from the dense model's logits, or from these and its hidden states "
            "[default: logits for scales, else none].",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = "auto",
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The dense model [default: the one in the checkpoint's report].", rich_help_panel=HOW
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for so long.", rich_help_panel=HOW)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser.", rich_help_panel=HOW)] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to read [without any of the three: the text once].", rich_help_panel=HOW)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate [default: by what is trained].", rich_help_panel=HOW)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.", rich_help_panel=HOW)] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes per step.", rich_help_panel=HOW)] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Rows of text at most.", rich_help_panel=HOW)] = 1024,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens per row.", rich_help_panel=HOW)] = 512,
    load_4bit: Annotated[
        bool,
        typer.Option("--load-4bit", help="Frozen dense weights in 4 bits while training.", rich_help_panel=HOW),
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Keep less for the way back and compute it again: a third less memory, a third more time.",
            rich_help_panel=HOW,
        ),
    ] = False,
    compute_dtype: Annotated[
        str, typer.Option(help="auto is float32 on CPU, bfloat16 elsewhere.", rich_help_panel=HOW)
    ] = "auto",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    trust_remote_code: o.Trust = False,
    cache: o.Cache = None,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Train a compressed checkpoint on in its compressed form: another one of the same bytes, never a worse one."""
    from lrcompress.cli.show import quiet_libraries, show_training
    from lrcompress.heal import HealSpec
    from lrcompress.heal import heal as run_heal
    from lrcompress.parallel.processes import processes
    from lrcompress.report.progress import Reporter
    from lrcompress.training.settings import Settings

    quiet_libraries()
    o.check_result(json_file, Path(output).expanduser() if output else None)
    settings = Settings(
        train=train, optimizer=optimizer, distill=distill, lr=lr, steps=steps, tokens=tokens, minutes=minutes,
        batch=batch_size, accumulate=accumulate, seed=seed, device=device, dtype=compute_dtype, load_4bit=load_4bit,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    spec = HealSpec(
        checkpoint, tuple(data or ["python-docs"]), samples, seqlen, dense, output, settings, trust_remote_code
    )
    result = run_heal(spec, overwrite=overwrite, resume=resume, reporter=Reporter(quiet=quiet, verbose=verbose))
    if not processes().first:
        return
    show_training(result.report["healed"], result.folder, quiet=quiet)
    o.write_result(json_file, result.report)
