"""What a model writes: greedy continuations of a few prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lrcompress.calibration.files import read_text
from lrcompress.errors import InputError
from lrcompress.evaluation.loading import LoadedModel, load_model
from lrcompress.foreign.opening import check_model
from lrcompress.model.device import memory_errors
from lrcompress.model.generation import written
from lrcompress.model.limits import longest_context
from lrcompress.report.page import Samples
from lrcompress.report.progress import Reporter

NEW_TOKENS = 40
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "To bake a simple loaf of bread, you need",
)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank; InputError where it cannot be read or has none."""
    lines = read_text(path).splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--prompts {path} holds no prompt: write one a line")
    return prompts


def side_by_side(
    checkpoint: str,
    against: str | None,
    original: str,
    prompts: Sequence[str],
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    reporter: Reporter,
) -> Samples:
    """What the checkpoint writes and what the dense model does: `against`, or else `original`, where that lies here.

    A hub is never asked for `original`, and where it cannot be run the dense side is left out with a warning.
    """
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    reporter.say(f"{checkpoint} is writing")
    compressed = continuations(checkpoint, prompts, **options)
    dense = against or original
    if against is None and not _is_local(original):
        return Samples(list(prompts), compressed)
    reporter.say(f"{dense} is writing")
    try:
        return Samples(list(prompts), compressed, continuations(dense, prompts, **options), dense)
    except InputError as error:
        if against is not None:
            raise
        reporter.warn(f"the dense model is left out of the page: {error}")
        return Samples(list(prompts), compressed)


def _is_local(model: str) -> bool:
    try:
        return check_model(model) is not None
    except InputError:
        return False


def continuations(
    model: str, prompts: Sequence[str], *, device: str = "auto", trust_remote_code: bool = False
) -> list[str]:
    """At most 40 new tokens per prompt, the likeliest at each place; the model is loaded and dropped again."""
    with memory_errors(f"out of memory while {model} was generating: pass --no-generate"):
        loaded = load_model(model, device=device, trust_remote_code=trust_remote_code)
        return [_continue(loaded, prompt) for prompt in prompts]


@torch.no_grad()
def _continue(loaded: LoadedModel, prompt: str) -> str:
    model: Any = loaded.model  # of transformers, which generates
    tokenizer = loaded.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    longest = longest_context(model.config)
    if not ids.numel():
        raise InputError("a prompt is empty: give it at least one character")
    if longest is not None and ids.numel() + NEW_TOKENS > longest:
        raise InputError(
            f"a prompt has {ids.numel()} tokens, {loaded.label} reads at most {longest - NEW_TOKENS}: shorten it"
        )
    ids = ids.to(next(model.parameters()).device)
    ends = model.generation_config.eos_token_id
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    made = written(model, ids, NEW_TOKENS, draw=False, ends=ends)
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text
