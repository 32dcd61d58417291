"""What the `held_out` of report.json says, in words."""

from typing import Any


def times_dense(held_out: dict[str, Any]) -> str:
    """How many times the perplexity on held-out text is that of before, with its standard error where it is known."""
    times, error = held_out["perplexity"] / held_out["before"], held_out.get("ratio_stderr")
    return f"{times:.2f}" if error is None else f"{times:.3f} ± {error:.3f}"


def windows_in_words(held_out: dict[str, Any]) -> str:
    """How much text a figure rests on."""
    return "1 window" if held_out["windows"] == 1 else f"{held_out['windows']} windows"
