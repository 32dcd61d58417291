"""Speed of one model, or of two by turns in one run: tokens per second, load time, memory, bytes, and their bounds."""

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.evaluation.bounds import Work, counted
from lrcompress.evaluation.footprint import Footprint, footprint
from lrcompress.evaluation.gates import Expectation, judge, parse_expectation
from lrcompress.evaluation.loading import load_network
from lrcompress.foreign.opening import check_model
from lrcompress.model.device import memory_errors, resolve_device, resolve_dtype
from lrcompress.model.limits import known_tokens, longest_context
from lrcompress.report.progress import Reporter

DENSE, COMPRESSED = "dense", "compressed"
PHASES = ("prefill", "decode")
SEED = 0


@dataclass(frozen=True)
class BenchSpec:
    """Every batch size with every context length; new_tokens are decoded after each context, one by one."""

    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (128, 512)
    new_tokens: int = 32
    repeats: int = 5
    compile: bool = False


@dataclass
class _Runner:
    """A model and how it is called."""

    folder: Path
    model: nn.Module
    options: dict[str, Any]
    call: Callable[..., Any]


def bench(
    model: str,
    spec: BenchSpec,
    against: str | None = None,
    expect: Sequence[str] = (),
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """The contract's bench JSON; without `against` the dense figures are None. Expectations are checked first.

    Prefill is one call on random tokens to the first new token, logits of the last position only where the model can;
    decoding is a plain greedy loop over the KV cache. Of the `repeats`, each runs both models, the first by turns.
    """
    reporter = reporter or Reporter(quiet=True)
    expectations = [parse_expectation(text) for text in expect]
    _check_expectations(expectations, against is not None)
    labels = {COMPRESSED: model} if against is None else {DENSE: against, COMPRESSED: model}
    for label in labels.values():
        check_model(label)
    resolve_device(device)
    resolve_dtype(dtype, torch.float32)
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with memory_errors("out of memory: use a smaller --batch or --context"):
        prints: dict[str, Footprint] = {}
        for side, label in labels.items():
            reporter.say(f"loading {label} in a process of its own")
            prints[side] = footprint(label, **options)  # type: ignore[arg-type]
        runners = {side: _runner(label, options) for side, label in labels.items()}
        _check_fit(runners, spec)
        rows, bounds, kernels = _rows(runners, spec, reporter)
    result: dict[str, Any] = {
        "schema": 1,
        "model": model,
        "against": against,
        "rows": rows,
        "load_seconds": _sides({side: p.load_seconds for side, p in prints.items()}),
        "rss_bytes": _sides({side: p.rss_bytes for side, p in prints.items()}),
        "bytes": _sides({side: CheckpointReader(r.folder).bytes for side, r in runners.items()}),
        "bounds": bounds,
        "kernels": kernels,
        "settings": {
            **_settings(runners[COMPRESSED].model, spec),
            "stored_dtype": _sides({side: _stored_dtype(r.folder) for side, r in runners.items()}),
        },
    }
    own, other = (_metrics(result, side) for side in (COMPRESSED, DENSE))
    result["expectations"] = [judge(e, {"bench": own}, {}, {"bench": other}) for e in expectations]
    return result


def _check_expectations(expectations: Sequence[Expectation], both: bool) -> None:
    """InputError for a metric that will not be measured, before anything is."""
    names = ["load_seconds", "rss_bytes", "bytes"]
    speedups = [f"{phase}_speedup" for phase in PHASES] if both else []
    for expectation in expectations:
        if not both and expectation.metric.endswith("_speedup"):
            raise InputError(f"expectation {expectation.expression!r} needs --against")
        other = {"bench": dict.fromkeys(names, 1.0)} if both else None
        judge(expectation, {"bench": dict.fromkeys(names + speedups, 1.0)}, {}, other)


def _metrics(result: dict[str, Any], side: str) -> dict[str, float]:
    """What an expectation can name; a speedup is that of the slowest row."""
    found = {key: result[key][side] for key in ("load_seconds", "rss_bytes", "bytes")}
    if side == COMPRESSED and result["against"] is not None:
        for phase in PHASES:
            found[f"{phase}_speedup"] = min(row["speedup"] for row in result["rows"] if row["phase"] == phase)
    return {key: value for key, value in found.items() if value is not None}


def _sides(values: dict[str, Any]) -> dict[str, Any]:
    return {side: values.get(side) for side in (DENSE, COMPRESSED)}


def _runner(label: str, options: dict[str, Any]) -> _Runner:
    folder, model = load_network(label, **options)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return _Runner(folder, model, {"use_cache": True, **last}, model)


def _check_fit(runners: dict[str, _Runner], spec: BenchSpec) -> None:
    """InputError where a model reads fewer tokens than asked for."""
    needed = max(spec.contexts) + spec.new_tokens
    for runner in runners.values():
        longest = longest_context(runner.model.config)
        if longest is not None and needed > longest:
            raise InputError(
                f"--context {max(spec.contexts)} and --new-tokens {spec.new_tokens} need {needed} positions, "
                f"{runner.folder} has {longest}: ask for fewer"
            )


def _rows(
    runners: dict[str, _Runner], spec: BenchSpec, reporter: Reporter
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, dict[str, int]]]:
    """The rows, and the bounds and the compressed model's kernels of the first of either phase."""
    vocabulary = min(known_tokens(r.model) for r in runners.values())
    device = next(runners[COMPRESSED].model.parameters()).device
    rows: list[dict[str, Any]] = []
    bounds: dict[str, Any] = {}
    kernels: dict[str, dict[str, int]] = {}
    points = [(batch, context) for batch in spec.batches for context in spec.contexts]
    with reporter.phase("bench", len(points)) as tick:
        for batch, context in points:
            generator = torch.Generator().manual_seed(SEED)
            ids = torch.randint(vocabulary, (batch, context), generator=generator).to(device)
            works = {side: _work(runner, ids) for side, runner in runners.items()}
            seconds = _interleaved(runners, ids, spec)
            for phase, tokens in zip(PHASES, (batch * context, batch * spec.new_tokens), strict=True):
                bound = _bound(phase, {side: work[phase] for side, work in works.items()}, batch * context)
                bounds.setdefault(phase, bound)
                kernels.setdefault(phase, dict(works[COMPRESSED][phase].kernels))
                taken = {side: times[phase] for side, times in seconds.items()}
                rows.append(_row(phase, batch, context, tokens, taken, bound["speedup"]))
            tick()
    return rows, bounds, kernels


@torch.inference_mode()
def _work(runner: _Runner, ids: Tensor) -> dict[str, Work]:
    """The work of the prefill and of one decoding step. These runs are the warm-up too."""
    prefill, found = counted(runner.model, lambda: runner.model(input_ids=ids, **runner.options))
    token, cache = ids[:, -1:], found.past_key_values
    decode, _ = counted(runner.model, lambda: runner.model(input_ids=token, past_key_values=cache, **runner.options))
    return {"prefill": prefill, "decode": decode}


def _interleaved(runners: dict[str, _Runner], ids: Tensor, spec: BenchSpec) -> dict[str, dict[str, list[float]]]:
    """Side to phase to the seconds of every repetition."""
    if spec.compile:
        _compile(runners, ids, spec.new_tokens)
    seconds: dict[str, dict[str, list[float]]] = {side: {phase: [] for phase in PHASES} for side in runners}
    order = list(runners)
    for _ in range(spec.repeats):
        for side in order:
            for phase, taken in zip(PHASES, _once(runners[side], ids, spec.new_tokens), strict=True):
                seconds[side][phase].append(taken)
        order.reverse()
    return seconds


def _compile(runners: dict[str, _Runner], ids: Tensor, new_tokens: int) -> None:
    """Compile afresh for these sizes: torch gives up on a function that it compiled too often."""
    torch.compiler.reset()
    for runner in runners.values():
        runner.call = torch.compile(runner.model, dynamic=True)
        try:
            _once(runner, ids, new_tokens)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InvalidCxxCompiler) as error:  # type: ignore[attr-defined]
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--compile: torch cannot compile {runner.folder} here ({reason})") from error


@torch.inference_mode()
def _once(runner: _Runner, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for `new_tokens` more."""
    _wait(ids.device)
    start = time.perf_counter()
    found = runner.call(input_ids=ids, **runner.options)
    token = found.logits[:, -1:].argmax(-1)
    _wait(ids.device)
    first = time.perf_counter()
    for _ in range(new_tokens):
        found = runner.call(input_ids=token, past_key_values=found.past_key_values, **runner.options)
        token = found.logits[:, -1:].argmax(-1)
    _wait(ids.device)
    return first - start, time.perf_counter() - first


def _wait(device: torch.device) -> None:
    """Until the accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _bound(phase: str, works: dict[str, Work], tokens: int) -> dict[str, Any]:
    """Multiply-adds per token of a prefill, bytes of weights per step of decoding; and dense over compressed."""
    if phase == "prefill":
        unit, values = "multiply_adds_per_token", {side: w.multiply_adds / tokens for side, w in works.items()}
    else:
        unit, values = "weight_bytes_per_step", {side: w.weight_bytes for side, w in works.items()}
    speedup = values[DENSE] / values[COMPRESSED] if DENSE in values else None
    return {"unit": unit, **_sides(values), "speedup": speedup}


def _row(
    phase: str, batch: int, context: int, tokens: int, seconds: dict[str, list[float]], bound: float | None
) -> dict[str, Any]:
    """Medians; the spread is (p90 - p10) / median of the seconds, the larger of both models'."""
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    speeds = _sides({side: tokens / median for side, median in medians.items()})
    waits = _sides(medians if phase == "prefill" else {})
    return {
        "phase": phase,
        "batch": batch,
        "context": context,
        **{f"{side}_tokens_per_s": speed for side, speed in speeds.items()},
        "speedup": medians[DENSE] / medians[COMPRESSED] if DENSE in medians else None,
        "spread": max(spread(taken) for taken in seconds.values()),
        "bound": bound,
        **{f"{side}_first_token_seconds": wait for side, wait in waits.items()},
    }


def spread(values: Sequence[float]) -> float:
    """(p90 - p10) / median."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return (deciles[-1] - deciles[0]) / statistics.median(values)


def _stored_dtype(folder: Path) -> str:
    return str(CheckpointReader(folder).dtype).removeprefix("torch.")


def _settings(model: nn.Module, spec: BenchSpec) -> dict[str, Any]:
    """What the figures depend on beside the models."""
    parameter = next(model.parameters())
    return {
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "new_tokens": spec.new_tokens,
        "repeats": spec.repeats,
        "compile": spec.compile,
        "torch": torch.__version__,
    }
