"""The loop: transformers' Trainer with a budget, a learning rate that follows it, and evaluations."""

import json
import math
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from lrcompress.checkpoint.writer import write_tensors
from lrcompress.model.device import fast_float32, resolve_device
from lrcompress.report.progress import Reporter
from lrcompress.stages.workspace import write_json
from lrcompress.training.distill import Bound, Teacher, captured_outputs, divergence, feature_error
from lrcompress.training.optimizers import forget_momentum, make_optimizer
from lrcompress.training.rows import IGNORED, Rows
from lrcompress.training.schedule import BACK, NOISE, PATIENCE, SLOWER, Progress, evaluations_at, rate_at
from lrcompress.training.settings import Settings
from lrcompress.training.tail import Tail
from lrcompress.training.trainable import Trainable

TOGETHER = 4
"""Held-out rows that are read at once."""

FEATURE_WEIGHT = 1.0
"""Of the relative error of hidden states beside the KL of logits, in nats."""

UNLIMITED = 10**9
"""Steps, where the budget is one of tokens or minutes."""

BEST, STATE, PROGRESS = "best.safetensors", "trained.safetensors", "progress.json"
START = "start.safetensors"
"""What is trained, as it was at the best evaluation, in float32: BEST is what would be stored."""


def held_out_loss(tail: Tail, rows: Rows, dtype: torch.dtype, share: slice = slice(None)) -> Tensor:
    """(2,) float64: the tail's model's summed negative log-likelihood of targets in nats, and how many there are."""
    found, device = torch.zeros(2, dtype=torch.float64), next(tail.model.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        taken = zip(rows.ids[share].split(TOGETHER), rows.targets[share].split(TOGETHER), strict=True)
        for ids, targets in ((some.to(device), asked.to(device)) for some, asked in taken):
            hidden = tail.run(tail.model, ids)
            for part in tail.parts(ids, hidden):
                loss = negative_log_likelihood(tail.logits(ids[:, part], hidden[:, part]), targets[:, part])
                found += torch.tensor([float(loss), float((targets[:, part] != IGNORED).sum())], dtype=torch.float64)
    return found


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over targets (rows, positions) but the ignored ones, of logits (rows, positions, vocabulary), in nats."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def mean_loss(model: nn.Module, rows: Rows, dtype: torch.dtype) -> float:
    """Mean negative log-likelihood of a target of the rows, in nats; a non-finite one is an ArithmeticError."""
    total, count = held_out_loss(Tail(model.eval()), rows, dtype).tolist()
    if not math.isfinite(total):
        raise ArithmeticError("the checkpoint puts out non-finite logits")
    return float(total / count)


class Healer(Trainer):
    """transformers' Trainer over what `trainable` marks; `progress` tells how far it is."""

    def __init__(
        self, trainable: Trainable, settings: Settings, rows: Rows, held_out: Rows, teacher: Teacher | None,
        folder: Path, dtype: torch.dtype, reporter: Reporter, progress: Progress,
    ) -> None:  # fmt: skip
        self.trainable, self.settings, self.teacher, self.dtype = trainable, settings, teacher, dtype
        self.held_out, self.folder, self.reporter, self.progress = held_out, folder, reporter, progress
        self.bound = Bound(trainable.model) if settings.distill == "features" else None
        self.tail = Tail(trainable.model)
        self._started = self._resumed = 0.0
        self._sums = torch.zeros(3, dtype=torch.float64)
        arguments = training_arguments(settings, folder, dtype)
        per_step = settings.batch * settings.accumulate * arguments.world_size
        self.total_steps = settings.steps or math.ceil(len(rows) / per_step)
        limited = settings.tokens is not None or settings.minutes is not None
        arguments.max_steps = UNLIMITED if limited else self.total_steps
        optimizer = make_optimizer(settings.optimizer, trainable, settings.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self.progress.rate * rate_at(self.fraction))
        super().__init__(
            trainable.model,  # type: ignore[arg-type]
            arguments,
            data_collator=collate,
            train_dataset=rows,
            callbacks=[_Watch(self)],
            optimizers=(optimizer, schedule),
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss below is divided by the targets of the whole step

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent."""
        budget, done = self.settings, self.progress
        if budget.minutes is not None:
            return done.seconds / (60 * budget.minutes)
        if budget.tokens is not None:
            return done.tokens / budget.tokens
        return done.steps / self.total_steps

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """Summed loss of the targets, over how many the whole step has."""
        ids, targets, indices = inputs["input_ids"], inputs["labels"], inputs["index"].tolist()
        teacher = self.teacher
        blocks = teacher.blocks if teacher is not None and self.settings.distill == "features" else []
        with captured_outputs(self.trainable.model, blocks) as outputs:
            hidden = self.tail.run(model, ids)

        def of(logits: Tensor, part: slice) -> Tensor:
            if teacher is None:
                return negative_log_likelihood(logits, targets[:, part])
            return divergence(teacher, indices, logits, targets[:, part], part)

        loss = self.tail.loss(hidden, ids, of)
        if teacher is not None and outputs:
            loss = loss + FEATURE_WEIGHT * feature_error(teacher, indices, outputs, targets)
        asked = (targets != IGNORED).sum()
        self._sums += torch.tensor([float(loss.detach()), float(asked), targets.numel()], dtype=torch.float64)
        counted = asked if num_items_in_batch is None else num_items_in_batch
        loss = loss * self.accelerator.num_processes / counted
        return (loss, {}) if return_outputs else loss

    @fast_float32()
    def run(self) -> None:
        """Train to the end of the budget or of the patience, from the last checkpoint where there is one."""
        last = last_complete(self.folder)
        if last is not None:
            self.progress = Progress(**json.loads((Path(last) / PROGRESS).read_text()))
            self.reporter.say(f"resuming after step {self.progress.steps}")
        else:
            self._keep_start()
        self._resumed, self._started = self.progress.seconds, time.perf_counter()
        self.train(resume_from_checkpoint=last)

    def advance(self) -> None:
        """Note a step of the optimiser; all processes agree on the time, which their learning rates depend on."""
        if self.bound is not None:
            self.bound.enforce()
        seconds = torch.tensor([self._resumed + time.perf_counter() - self._started], device=self.accelerator.device)
        before, self.progress.seconds = self.fraction, float(broadcast(seconds))
        self.progress.steps += 1
        self._loss, asked, read = self._added(self._sums)
        self._loss /= max(1.0, asked)
        self._sums.zero_()
        self.progress.tokens += int(read)
        self.due = evaluations_at(self.fraction) > evaluations_at(before) or self.fraction >= 1

    def _added(self, sums: Tensor) -> list[float]:
        """The sums of all processes."""
        if self.accelerator.num_processes > 1:
            sums = reduce(sums.to(self.accelerator.device)).cpu()
        found: list[float] = sums.tolist()
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss of what would be stored now; keeps it where it is the best so far."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.trainable.model.eval()
        sums = torch.tensor([math.nan, 1.0], dtype=torch.float64)
        # What cannot be stored, such as a scale below zero, is no better than any loss.
        with suppress(ArithmeticError), self.trainable.as_stored():
            sums = held_out_loss(self.tail, self.held_out, self.dtype, slice(rank, None, world))
        total, count = self._added(sums)
        self.control.should_evaluate = False  # not again at the end of the epoch
        loss, progress = total / count, self.progress
        better = loss < min(progress.best + NOISE, progress.before)
        if better:
            progress.best, progress.best_step = min(loss, progress.best), progress.steps
            if self.args.should_save:
                write_tensors(self.folder / BEST, self.trainable.values())
            self._keep_start()
        progress.waiting = 0 if better else progress.waiting + 1
        if math.isfinite(loss) and math.isfinite(self._loss):
            progress.history.append({"step": progress.steps, "train": self._loss, "held_out": loss})
        self.reporter.say(
            f"  step {progress.steps}, {min(1.0, self.fraction):.0%}: loss {self._loss:.4f}, held out {loss:.4f}"
            + (" (best)" if better else "") + f", {progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s"
        )  # fmt: skip
        if progress.waiting >= PATIENCE:
            self.reporter.say(f"  no better for {PATIENCE} evaluations: training ends early")
            self.control.should_training_stop = True
        elif not better and self.fraction < 1:
            self._slow_down(back=not loss < (progress.best + progress.before) / 2)
        return {"eval_loss": loss}

    def _keep_start(self) -> None:
        if self.args.should_save:
            write_tensors(self.folder / START, {name: p.detach().cpu() for name, p in self._trained()})
        self.accelerator.wait_for_everyone()

    def _slow_down(self, *, back: bool) -> None:
        """On with less of the learning rate, and from the best state where `back` says so."""
        left = BACK if back else SLOWER
        if back:
            self._restore(self.folder / START)
            forget_momentum(self.optimizer)
        self.progress.rate *= left
        for group in self.optimizer.param_groups:  # the schedule has set the next step's already
            group["lr"] *= left
        said = "worse: back to the best state" if back else "no better"
        self.reporter.say(f"  {said}, learning rate times {self.progress.rate:g}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / STATE, dict(self._trained()))
            write_json(folder / PROGRESS, asdict(self.progress))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(Path(resume_from_checkpoint) / STATE)

    @torch.no_grad()
    def _restore(self, file: Path) -> None:
        saved = load_file(file)
        for name, parameter in self._trained():
            parameter.copy_(saved[name])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.trainable.model.named_parameters() if p.requires_grad]


class _Watch(TrainerCallback):
    """Asks for an evaluation and a checkpoint when they are due, and ends the training with its budget."""

    def __init__(self, healer: Healer) -> None:
        self._healer = healer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the learning rate of the next step is set."""
        self._healer.advance()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """After it."""
        control.should_evaluate = control.should_save = self._healer.due
        control.should_training_stop |= self._healer.fraction >= 1
        return control


def last_complete(folder: Path) -> str | None:
    """The newest checkpoint in `folder` that was written to its end; those that were not are deleted."""
    while (last := get_last_checkpoint(str(folder))) is not None:
        if all((Path(last) / name).exists() for name in (STATE, PROGRESS, TRAINER_STATE_NAME)):
            return last
        shutil.rmtree(last)
    return None


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, without the columns on the right in which no row has a target."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    width = int((batch["labels"] != IGNORED).any(0).nonzero().max()) + 1
    return {key: tensor[:, :width] if tensor.dim() == 2 else tensor for key, tensor in batch.items()}


def training_arguments(settings: Settings, folder: Path, dtype: torch.dtype) -> TrainingArguments:
    """transformers' arguments; evaluations and checkpoints come from the callback."""
    found = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.rate,
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=settings.seed,
        use_cpu=resolve_device(settings.device).type == "cpu",
        train_sampling_strategy="sequential",  # the rows lie in the order that they are trained in
        remove_unused_columns=False,
        ddp_broadcast_buffers=False,
        logging_strategy="no",
        save_strategy="no",
        save_total_limit=1,
        disable_tqdm=True,
        report_to=[],
    )
    found._n_gpu = min(1, found.n_gpu)  # several devices are several processes, not copies within one
    return found
