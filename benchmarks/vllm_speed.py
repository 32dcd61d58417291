"""How fast does vLLM serve the stored formats, times the dense model? Random weights, whole models by turns in one run.

    python benchmarks/vllm_speed.py --folder /tmp/vllm                # hidden 2048, MLP 8192, 3 blocks, one thread
    python benchmarks/vllm_speed.py --folder /tmp/vllm --formats pivoted --dtype float32
    python benchmarks/vllm_speed.py --folder /tmp/vllm --cpu-time     # on a busy machine: what the process itself ran
    python benchmarks/vllm_speed.py --folder /tmp/vllm --hidden 128 --mlp 256 --blocks 1 --rounds 1    # does it run?

In an environment with vLLM and lrcompress (Makefile, serve-check). Every model has a process of its own, which waits
until its turn comes; the small vocabulary leaves the time to the blocks. Decoding is the time of 33 tokens less that of
one. A speedup is the median over the rounds of dense's time in a round by the format's in the same; beside it the
smallest and the largest.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}  # fmt: skip

FORMATS = {"low_rank": 0.2, "pivoted": 0.1, "coded 3.1 bits": 0.0, "quantized 4:64": 0.0}
"""benchmarks/stored.py's names, and what those that have a rank remove of the bytes."""

NEW = 32
VOCABULARY = 512


@dataclass(frozen=True)
class Job:
    """Sequences at a time and tokens in each of their prompts; decoding where `new` tokens follow the first."""

    name: str
    sequences: int
    context: int
    new: int

    @property
    def tokens(self) -> int:
        """That the time is for."""
        return self.sequences * (self.new or self.context)


def jobs(context: int) -> list[Job]:
    return [Job("decode", 1, 16, NEW), Job("decode, 8 at a time", 8, 16, NEW), Job(f"prefill {context}", 1, context, 0)]


CLOCKS = {False: time.perf_counter, True: time.process_time}
"""By whether a process's own time is wanted."""


def work(folder: Path, dtype: str, context: int, clock: Callable[[], float]) -> None:
    """Serve `folder` and answer each line, a job's number, with the seconds that it took."""
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder), dtype=dtype, enforce_eager=True, max_model_len=context + NEW + 1, enable_prefix_caching=False,
        max_num_batched_tokens=max(2048, context), disable_log_stats=True,
    )  # fmt: skip

    def seconds(prompts: list[dict[str, list[int]]], count: int) -> float:
        settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = clock()
        model.generate(prompts, settings, use_tqdm=False)
        return clock() - start

    print("READY", flush=True)
    for line in sys.stdin:
        job = jobs(context)[int(line)]
        prompts = [{"prompt_token_ids": random.choices(range(VOCABULARY), k=job.context)} for _ in range(job.sequences)]
        taken = seconds(prompts, 1 + job.new) - (seconds(prompts, 1) if job.new else 0)
        print(f"TOOK {taken}", flush=True)


class Served:
    """A model in a process of its own."""

    def __init__(self, folder: Path, dtype: str, context: int, threads: int, more: list[str]) -> None:
        command = [sys.executable, __file__, "--folder", str(folder), "--dtype", dtype, "--context", str(context)]
        environment = {**os.environ, **SETTINGS, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [*command, "--serve", *more], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._said("READY")

    def _said(self, word: str) -> str:
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith(word)), None)
        if line is None:
            sys.exit("vLLM ended")
        return line.removeprefix(word)

    def takes(self, job: int) -> float:
        """Seconds."""
        assert self.process.stdin is not None
        print(job, file=self.process.stdin, flush=True)
        return float(self._said("TOOK"))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measured(models: dict[str, Served], count: int, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds by model, job and round; a round before them does not count."""
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(count)] for name in models}
    for turn in range(rounds + 1):
        for job in range(count):
            for name, model in models.items():
                taken = model.takes(job)
                if turn:
                    found[name][job].append(taken)
    return found


def rows(found: dict[str, list[list[float]]], context: int) -> list[str]:
    """Lines of Markdown, a row a model: tokens/s, and times dense."""
    lines = []
    for name, times in found.items():
        cells = []
        for job, taken, dense in zip(jobs(context), times, found["dense"], strict=True):
            ratios = [a / b for a, b in zip(dense, taken, strict=True)]
            speed = job.tokens / statistics.median(taken)
            cells.append(f"{speed:.1f}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the models, which stay there")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="names of benchmarks/stored.py")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="count what the process ran, not what passed")
    parser.add_argument("--make", action="store_true", help="write the models and end")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        os.environ.update(SETTINGS)
        return work(given.folder, given.dtype, given.context, CLOCKS[given.cpu_time])

    import torch
    from layers import processor
    from memory import generate
    from whole import compressed

    sizes = f"{given.hidden}-{given.mlp}-{given.blocks}"
    dense = generate(given.folder / f"dense-{sizes}", given.hidden, given.mlp, given.blocks, VOCABULARY)
    folders = {"dense": dense}
    for name in given.formats:
        folder = given.folder / f"{name.replace(' ', '-').replace(':', '-')}-{sizes}"
        folders[name] = compressed(dense, folder, name, FORMATS.get(name, 0.2))
    if given.make:
        return None
    more = ["--cpu-time"] if given.cpu_time else []
    models = {name: Served(folder, given.dtype, given.context, given.threads, more) for name, folder in folders.items()}
    found = measured(models, len(jobs(given.context)), given.rounds)
    for model in models.values():
        model.close()
    from vllm import __version__

    print(json.dumps({"vllm": __version__, "torch": torch.__version__, "threads": given.threads, "cpu": processor(),
                      "dtype": given.dtype, "sizes": sizes, "rounds": given.rounds, "time": "of the process" if given.cpu_time else "passed"}))  # fmt: skip
    print(f"| tokens/s: times dense | {' | '.join(job.name for job in jobs(given.context))} |")
    print("|---" * (1 + len(jobs(given.context))) + "|")
    for line in rows(found, given.context):
        print(line)
    return None


if __name__ == "__main__":
    main()
