"""Printing speeds."""

from typing import Any

from rich.table import Table

from lrcompress.cli.show import console, show_expectations
from lrcompress.report.summary import narrow_table


def show_bench(result: dict[str, Any], *, quiet: bool) -> None:
    """Tokens per second with what bounds the gain, then load time, memory and bytes, then the expectations."""
    if not quiet:
        out = console()
        if said := other_dtype(result["settings"]):
            out.print(said)
        out.print(_bench_table(result))
        both, dtype = result["against"] is not None, result["settings"]["dtype"]
        for key, name, shown in (
            ("load_seconds", "load", lambda value: f"{value:.2f} s"),
            (
                "rss_bytes",
                f"growth of resident memory in {dtype}",
                lambda value: f"{value / 1e6:.1f} MB",
            ),
            ("bytes", "checkpoint", lambda value: f"{value / 1e6:.1f} MB"),
        ):
            dense, own = result[key]["dense"], result[key]["compressed"]
            out.print(f"{name}: {shown(own)}" + (f", dense {shown(dense)}" if both else ""))
        if both:
            out.print("bound: dense over compressed in linear layers, of")
        for phase, bound in result["bounds"].items():
            sides = ["compressed", *(["dense"] if both else [])]
            out.print(f"  {phase}: {', '.join(_bound(bound, side) for side in sides)}")
        for phase, kernels in result["kernels"].items():
            taken = ", ".join(f"{count} of {kernel}" for kernel, count in sorted(kernels.items()))
            if taken:
                out.print(f"kernels in {phase}: {taken}")
    show_expectations(result["expectations"], quiet=quiet)


def other_dtype(settings: dict[str, Any]) -> str | None:
    """A word where models are computed with in another dtype than they are stored in; None where that is the same."""
    computed, stored = settings["dtype"], settings["stored_dtype"]
    kept = stored["dense"] or stored["compressed"]
    if kept == computed:
        return None
    return (
        f"everything is computed in {computed}, dense weights are held in it too; stored are they in {kept}: "
        f"--compute-dtype {kept} compares memory and speed as they are stored"
    )


def _bound(bound: dict[str, Any], side: str) -> str:
    """What bounds one side, with its unit."""
    value, own = bound[side], "dense " if side == "dense" else ""
    if bound["unit"] == "weight_bytes_per_step":
        return f"{own}{value / 1e6:.1f} MB of weights in memory read a step"
    return f"{own}{value / 1e6:.1f} M multiply-adds a token"


def _bench_table(result: dict[str, Any]) -> Table:
    both = result["against"] is not None
    settings = result["settings"]
    table = narrow_table(
        f"{result['model']}" + (f" against {result['against']}" if both else "") + f", in {settings['dtype']}"
    )
    table.caption = (
        f"{settings['device']}, {settings['threads']} threads, "
        f"{'compiled, ' if settings['compile'] else ''}median of {settings['repeats']}"
    )
    pair = ["dense\ntokens/s", "tokens/s", "speedup", "bound"] if both else ["tokens/s"]
    for column in ("phase", "batch", "context", *pair, "spread", "first\ntoken, ms"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in result["rows"]:
        keys = ["dense", "compressed"] if both else ["compressed"]
        speeds = [f"{row[f'{key}_tokens_per_s']:.1f}" for key in keys]
        gains = [_times(row["speedup"]), _times(row["bound"])] if both else []
        waits = [row[f"{key}_first_token_seconds"] for key in keys]
        first = "/".join(f"{1000 * wait:.0f}" for wait in waits if wait is not None)
        table.add_row(
            row["phase"], str(row["batch"]), str(row["context"]), *speeds, *gains, f"{row['spread']:.1%}", first
        )
    return table


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
