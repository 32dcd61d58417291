"""Training a written checkpoint and putting what is better into its files; its bytes and its layout stay."""

import gc
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.writer import replace_tensors, write_tensors
from lrcompress.errors import InputError
from lrcompress.evaluation.loading import load_network
from lrcompress.model.device import compute_dtype, resolve_device
from lrcompress.model.limits import check_tokens, known_tokens, length_warning
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import peak_rss_bytes
from lrcompress.stages.workspace import write_json
from lrcompress.training.choices import choose
from lrcompress.training.distill import Teacher
from lrcompress.training.four_bit import quantise_frozen
from lrcompress.training.loop import BEST, Healer, mean_loss
from lrcompress.training.optimizers import optimizer_bytes
from lrcompress.training.rows import Rows
from lrcompress.training.schedule import Progress
from lrcompress.training.settings import Settings

BEFORE, OUTCOME = "before.safetensors", "outcome.json"


def improve(
    folder: Path, settings: Settings, rows: Rows, held_out: Rows, teacher: Teacher | None, scratch: Path,
    reporter: Reporter, *, trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train the checkpoint in `folder` and put the best state into its files, where it is better as loaded again.

    Returns what report.json says of it. `scratch` makes it resumable: the files change only after the training has
    ended, and what they held is kept there. At several processes all of them call this, the first one writes.
    """
    state, outcome = PartialState(), scratch / OUTCOME
    scratch.mkdir(parents=True, exist_ok=True)
    if not outcome.exists():
        found = _train(folder, settings, rows, held_out, teacher, scratch, reporter, trust_remote_code)
        if state.is_main_process:
            write_json(outcome, found)
    state.wait_for_everyone()
    found = json.loads(outcome.read_text())
    if state.is_main_process and found["kept"]:
        replace_tensors(folder, load_file(scratch / BEST))
        found["held_out"]["after"] = _measured(folder, settings, held_out, trust_remote_code)
        found["kept"] = found["held_out"]["after"] < found["held_out"]["before"]
    if state.is_main_process and not found["kept"]:
        replace_tensors(folder, load_file(scratch / BEFORE))
        found["held_out"]["after"] = found["held_out"]["before"]
        reporter.warn("training did not lower the held-out loss: the weights are those it began with")
    return found


def _train(
    folder: Path, settings: Settings, rows: Rows, held_out: Rows, teacher: Teacher | None, scratch: Path,
    reporter: Reporter, trust_remote_code: bool,
) -> dict[str, Any]:  # fmt: skip
    """The training itself; leaves the best state and what it began with in `scratch`."""
    reader, dtype = CheckpointReader(folder), training_dtype(settings)
    model = _load(folder, settings, trust_remote_code)
    for ids in (rows.ids, held_out.ids):
        check_tokens(ids, known_tokens(model), "the checkpoint")
    if settings.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(f"--gradient-checkpointing: {type(model).__name__} cannot do it: leave it out")
    warning = length_warning(model, rows.ids.shape[1])
    if warning and not any(said.endswith(warning) for said in reporter.warnings):
        reporter.warn(f"--seqlen: {warning}")
    progress = Progress(before=mean_loss(model, held_out, dtype))
    progress.best = progress.before
    trainable = choose(model, settings.train, reader)
    layers = quantise_frozen(model, dtype) if settings.load_4bit else 0
    if layers:
        progress.best = mean_loss(model, held_out, dtype)
    if PartialState().is_main_process:
        write_tensors(scratch / BEFORE, dict(reader.read(list(trainable.stored))))
    reporter.say(
        f"training {trainable.count / 1e6:.2f} M numbers in {len(trainable.stored)} tensors on {len(rows)} rows; "
        f"held-out loss {progress.before:.4f}"
    )
    healer = Healer(trainable, settings, rows, held_out, teacher, scratch, dtype, reporter, progress)
    healer.run()
    done = healer.progress
    return {
        "train": settings.train,
        "optimizer": settings.optimizer,
        "distill": settings.distill,
        "lr": settings.rate,
        "lr_left": done.rate,
        "minutes": done.seconds / 60,
        "steps": done.steps,
        "tokens": done.tokens,
        "tokens_per_second": done.tokens / done.seconds if done.seconds else 0.0,
        "processes": PartialState().num_processes,
        "rows": {"train": len(rows), "held_out": len(held_out)},
        "held_out": {"before": done.before, "after": done.best, "best_step": done.best_step},
        "history": done.history,
        "kept": done.best_step > 0,
        "trainable": trainable.count,
        "optimizer_bytes": optimizer_bytes(healer.optimizer),
        "four_bit_layers": layers,
        "peak_rss_bytes": peak_rss_bytes(),
        **_device_peak(),
    }


def training_dtype(settings: Settings) -> torch.dtype:
    """What is computed in; the trained numbers themselves are float32."""
    if settings.dtype == "auto":
        return compute_dtype(resolve_device(settings.device), torch.bfloat16)
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def _load(folder: Path, settings: Settings, trust_remote_code: bool) -> nn.Module:
    name = str(training_dtype(settings)).removeprefix("torch.")
    device = str(PartialState().device)
    return load_network(str(folder), device=device, dtype=name, trust_remote_code=trust_remote_code)[1]


def _measured(folder: Path, settings: Settings, held_out: Rows, trust_remote_code: bool) -> float:
    gc.collect()
    return mean_loss(_load(folder, settings, trust_remote_code), held_out, training_dtype(settings))


def _device_peak() -> dict[str, int]:
    if not torch.accelerator.is_available():
        return {}
    return {"peak_device_bytes": int(torch.accelerator.max_memory_allocated())}
