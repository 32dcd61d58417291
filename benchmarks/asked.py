"""What benchmarks of perplexity against bytes have in common: their options, their texts, how they say what ran."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from layers import processor
from torch import Tensor

from lrcompress.calibration.corpus import parse_source
from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.evaluation.loading import LoadedModel
from lrcompress.evaluation.tasks import parse_tasks, task_blocks


def options(doc: str | None, peers: Sequence[str], samples: int, of: str) -> argparse.ArgumentParser:
    """Options of a run on one model: texts to calibrate and to measure on, a folder to work in; `of`: of what samples are."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peers", nargs="*", default=list(peers), choices=list(peers))
    parser.add_argument("--samples", type=int, default=samples, help=of)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=16)
    return parser


def tasks_of(args: argparse.Namespace) -> list[str]:
    """The texts as tasks."""
    return [f"tokens:{text}@{args.seqlen}" for text in args.texts]


def evaluation_blocks(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, Tensor]:
    """Task to its blocks (windows, seqlen)."""
    return {
        task.key: task_blocks(task, loaded.tokenizer, loaded.folder, held_out_only=False, limit=args.limit)
        for task in parse_tasks(tasks_of(args))
    }


def calibration_ids(args: argparse.Namespace, loaded: LoadedModel, each: int) -> Tensor:
    """(samples, seqlen): `each` of every source."""
    sources = [(parse_source(spec), each, args.seqlen) for spec in args.calibration]
    return calibration_blocks(sources, loaded.tokenizer, 0, loaded.folder).ids


def say_what_ran() -> None:
    """The command, versions and machine, above a table."""
    print(f"`{' '.join(sys.argv)}`; torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}\n")


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> None:
    """A Markdown table on standard output."""
    cells = [str(cell) for cell in head]
    print(f"| {' | '.join(cells)} |\n{'|---' * len(cells)}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
