"""Printing what could be done: a plan, or what every size would take and give."""

import math
from typing import Any

from rich.table import Table

from lrcompress.cli.show import console, show_joined
from lrcompress.overview import BITS, Choice, Overview
from lrcompress.report.summary import answer, bits_stored, block_kinds, kinds_table
from lrcompress.stages.needs import Needs

LOST = 1.0
"""Nats a token beyond which a prediction says no more than that it is too much."""


def show_plan(plan: dict[str, Any], *, quiet: bool) -> None:
    """The planned table."""
    if quiet:
        return
    from lrcompress.evaluation.in_use import planned_in_use

    out = console()
    out.print(f"needs {Needs(**plan['needs'])}")
    out.print(kinds_table(plan, block_kinds([t["name"] for t in plan["targets"]])))
    ratio, size = plan["ratio"], plan["bytes"]
    out.print(
        f"would remove {ratio['planned']:.2%} of the targets' bytes ({size['targets_dense'] / 1e6:.1f} to "
        f"{size['targets_stored'] / 1e6:.1f} MB, {bits_stored(plan):.2f} bits a weight), "
        f"{ratio['whole_model']:.2%} of the whole model, "
        f"checkpoint {size['checkpoint'] / 1e6:.2f} MB"
    )
    if in_use := planned_in_use(plan):
        out.print(str(in_use))
    if "predicted" in plan:
        out.print(predicted_in_words(plan["predicted"]["loss"]))
    if said := answer(plan, plan["asked"]):
        out.print(said)
    show_joined(plan, out)


def predicted_in_words(nats: float) -> str:
    """What a rise of the loss by so many nats a token does to perplexity."""
    said = f"predicted: the loss on the calibration text rises by {nats:.2g} nats a token"
    if nats > LOST:
        return f"{said}: this size cannot keep the model, take a larger one (lrcompress plan MODEL shows some)"
    return f"{said}, perplexity about × {math.exp(nats):.3g}"


def show_model(found: Overview) -> None:
    """A model in a few lines."""
    out = console()
    kinds = ", ".join(f"{kind} {count / 1e6:.4g}" for kind, count in found.numbers.items())
    sizes = ", ".join(f"{choice.bytes / 1e6:.3g} MB at {choice.bits:g}" for choice in found.choices)
    fits = "fits" if found.bytes < found.free else "does not fit"
    out.print(
        f"{found.model}: {found.bytes / 1e6:.4g} MB in {found.dtype}, {found.blocks} blocks; it {fits} in the "
        f"{found.free / 1e9:.3g} GB of memory that are free"
    )
    out.print(
        f"{sum(found.numbers.values()) / 1e6:.4g} million weights can be compressed: {kinds}; everything else is "
        f"{found.other / 1e6:.3g} MB"
    )
    out.print(f"as a checkpoint: {sizes} bits a weight; what each takes and loses: lrcompress plan {found.model}")
    out.print(f"compressing needs {found.needs} (32 samples of 1024 tokens)")
    out.print(f"begin: lrcompress compress {found.model} --bpw 4 --calibration YOUR.txt")


def show_choices(found: Overview, *, quiet: bool) -> None:
    """A row per size, with the plain rounding that is nearest to it."""
    if quiet:
        return
    out = console()
    out.print(_choices_table(found))
    if found.least > min(BITS):
        out.print(f"fewer than {found.least:.2f} bits a weight cannot be had here")
    if found.unit == "nats":
        out.print(
            "loss: predicted rise of the loss on the calibration text, in nats a token, within\n"
            "a factor of about two: 0.01 is 1 % of perplexity. auto is fitted to that text:\n"
            "elsewhere it loses three times as much or, where the text is short, far more"
        )
    elif found.unit == "relative":
        out.print(
            f"error: expected, as a part of the weights' size in metric {found.metric}; 0 is exact, 1 a zero weight"
        )
    out.print(
        "in memory: MB once loaded; decoding: times the dense layer's speed, of the largest\n"
        "weight, measured on this processor"
    )
    out.print(f"making one needs {found.needs}")
    if found.unit is None:
        out.print(f"predicted losses: lrcompress plan {found.model} --calibration YOUR.txt --cache DIR")
    out.print(f"make one: lrcompress compress {found.model} --bpw 4 --calibration YOUR.txt")


def _choices_table(found: Overview) -> Table:
    """In 80 columns."""
    lost = {"nats": ["loss"], "relative": ["error"], None: []}[found.unit]
    table = Table(title=f"{found.model} · {found.method}, {found.bytes / 1e6:.4g} MB in {found.dtype}")
    for column in ("bits", "MB", *lost, "in memory", "decoding", "plain", "MB", *lost):
        table.add_column(column, justify="left" if column == "plain" else "right")
    for choice in found.choices:
        table.add_row(*_cells(choice))
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 10**7 else f"{size / 1e6:.3g}"


def _cells(choice: Choice) -> list[str]:
    def lost(loss: float | None) -> list[str]:
        if choice.loss is None:
            return []
        return ["-" if loss is None else f"{loss:.2g}" if loss < 100 else f"{loss:.0f}"]

    return [
        f"{choice.bits:g}", _megabytes(choice.bytes), *lost(choice.loss),
        "-" if choice.memory is None else _megabytes(choice.memory),
        "-" if choice.speed is None else f"{choice.speed:.2f}x",
        choice.plain.base, _megabytes(choice.plain.bytes), *lost(choice.plain.loss),
    ]  # fmt: skip
