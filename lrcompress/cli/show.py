"""Printing results: tables on stdout."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from lrcompress.report.summary import block_kinds, kinds_table


def quiet_libraries() -> None:
    """Keep the log lines and bars of the libraries off the terminal; ours say what matters."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=120)


def show_plan(plan: dict[str, Any], *, quiet: bool) -> None:
    """The planned table."""
    if quiet:
        return
    out = console()
    out.print(kinds_table(plan, block_kinds([t["name"] for t in plan["targets"]])))
    ratio, size = plan["ratio"], plan["bytes"]
    out.print(
        f"would remove {ratio['planned']:.2%} of the targets' bytes ({size['targets_dense'] / 1e6:.1f} to "
        f"{size['targets_stored'] / 1e6:.1f} MB), {ratio['whole_model']:.2%} of the whole model; "
        f"needs up to {plan['disk_bytes'] / 1e6:.0f} MB of disk"
    )


def show_report(report: dict[str, Any], folder: Path, *, quiet: bool) -> None:
    """The final table and where the checkpoint lies."""
    if quiet:
        return
    out = console()
    out.print(kinds_table(report, block_kinds([t["name"] for t in report["targets"]])))
    ratio, size, seconds = report["ratio"], report["bytes"], report["seconds"]
    out.print(
        f"removed {ratio['stored']:.2%} of the targets' bytes, {ratio['whole_model']:.2%} of the whole model; "
        f"checkpoint {size['checkpoint'] / 1e6:.1f} MB; {seconds['total']:.0f} s, "
        f"peak memory {report['peak_rss_bytes'] / 1e6:.0f} MB"
    )
    if report["metric"] == "plain":
        out.print("metric plain reads no calibration text: on small models it destroys the model; measure before use")
    elif report["calibration"] is not None and not report["calibration"]["general"]:
        out.print("calibrated on python-docs or the model's own text, which is not general text: "
                  "pass --calibration with text like what the model will read")
    out.print(f"wrote {folder}")
