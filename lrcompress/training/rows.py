"""What is trained on: rows of tokens with what each position is to predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrcompress.calibration.corpus import (
    HELD_OUT,
    Source,
    bos_prefix,
    cut_blocks,
    documents,
    sampled_last,
    shares,
    split_held_out,
    tokenise,
)
from lrcompress.calibration.files import read_records
from lrcompress.calibration.own_text import sample_from_model
from lrcompress.errors import InputError

IGNORED = -100
"""The target of a position that nothing is asked of."""

HELD_OUT_ROWS = 8
"""Held-out rows of text at most, in all."""

PAIRS_PER_ROW = 4
"""Held-out prompts with answers count so many to a row of text: they are shorter."""


@dataclass(frozen=True)
class Rows(Dataset[dict[str, Tensor]]):
    """ids (rows, length) int64, filled up on the right; targets (rows, length): the next token, or IGNORED.

    Blocks are causal, so what stands on the right of a row changes nothing before it and needs no mask.
    """

    ids: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        targets = self.targets[index]
        # transformers counts what it averages over in `shift_labels`, where there are `labels`.
        return {
            "index": torch.tensor(index),
            "input_ids": self.ids[index],
            "labels": targets,
            "shift_labels": targets,
        }

    @property
    def scored(self) -> int:
        """Positions that something is asked of."""
        return int((self.targets != IGNORED).sum())

    @classmethod
    def of_blocks(cls, ids: Tensor) -> "Rows":
        """Every token of the blocks (rows, length) predicts the next."""
        return cls(ids, torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1))


def gather(
    sources: Sequence[Source], samples: int, seqlen: int, tokenizer: Any, seed: int, folder: Path,
    trust_remote_code: bool = False,
) -> tuple[Rows, Rows]:  # fmt: skip
    """Rows to train on, at most `samples` and in an order drawn by `seed`, and held-out ones.

    `folder` is the model that the source `self` is sampled from. Sources share the samples by their weights.
    """
    read_by, counts = dict[int, tuple[Rows, Rows]](), shares([source.weight for source in sources], samples)
    for place in sampled_last(sources):
        source, share = sources[place], counts[place]
        most = max(1, HELD_OUT_ROWS // len(sources))
        if source.name == "self":
            made = sample_from_model(folder, tokenizer, share + most, seqlen, seed, trust_remote_code=trust_remote_code)
            found, kept = Rows.of_blocks(made[:share]), Rows.of_blocks(made[share:])
        else:
            read = _pairs if "," in source.field else _text
            found, kept = read(source, share, most, seqlen, tokenizer, seed)
        if not len(found) or not len(kept):
            raise InputError(f"data {source.name} is too short to train on and to hold out a tenth: use more text")
        read_by[place] = found, kept
    train, held_out = ([read_by[place][part] for place in range(len(sources))] for part in (0, 1))
    order = torch.randperm(sum(map(len, train)), generator=torch.Generator().manual_seed(seed))
    whole = _joined(train)
    return Rows(whole.ids[order], whole.targets[order]), _joined(held_out)


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(torch.cat([part.ids for part in parts]), torch.cat([part.targets for part in parts]))


def _text(source: Source, samples: int, held_out: int, seqlen: int, tokenizer: Any, seed: int) -> tuple[Rows, Rows]:
    train, kept = split_held_out(tokenise(documents(source, tokenizer=tokenizer), tokenizer))
    prefix = bos_prefix(tokenizer)
    blocks = cut_blocks(train, seqlen, prefix)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:samples]
    return Rows.of_blocks(blocks[order]), Rows.of_blocks(cut_blocks(kept, seqlen, prefix)[:held_out])


def _pairs(source: Source, samples: int, held_out: int, seqlen: int, tokenizer: Any, seed: int) -> tuple[Rows, Rows]:
    """Prompts and answers of records; the last tenth of the records is held out."""
    records = _read_pairs(source)
    prefix, end = bos_prefix(tokenizer), [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    rows = [_pair_row(prefix, *pair, end, seqlen, tokenizer) for pair in records]
    cut = len(rows) - max(1, len(rows) // HELD_OUT)
    order = torch.randperm(cut, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return _stacked([rows[i] for i in order], seqlen), _stacked(rows[cut:][: PAIRS_PER_ROW * held_out], seqlen)


def _read_pairs(source: Source) -> list[tuple[str, str]]:
    path, fields = Path(source.name), source.field.split(",")
    if len(fields) != 2:
        raise InputError(f"data {source.name}:{source.field}: prompts and answers are written FILE.jsonl:PROMPT,ANSWER")
    found = []
    try:
        for record in read_records(path):
            found.append((record[fields[0]], record[fields[1]]))
    except (KeyError, TypeError) as error:
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f"{path} has a record without {error} (it has: {known}): write {path}:PROMPT,ANSWER"
        ) from error
    if not all(isinstance(text, str) for pair in found for text in pair):
        raise InputError(f"{path} has a {fields[0]} or {fields[1]} that is no text")
    return found


def _pair_row(
    prefix: list[int], prompt: str, answer: str, end: list[int], seqlen: int, tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Tokens and targets; too long a prompt loses its beginning, too long an answer its end."""
    asked, said = (tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in (prompt, answer))
    said = (said + end)[: seqlen - len(prefix) - 1]
    room = seqlen - len(prefix) - len(said)
    before = prefix + asked[max(0, len(asked) - room) :]
    ids = before + said
    return ids, [IGNORED] * (len(before) - 1) + said + [IGNORED]


def _stacked(rows: Sequence[tuple[list[int], list[int]]], seqlen: int) -> Rows:
    ids = torch.zeros(len(rows), seqlen, dtype=torch.int64)
    targets = torch.full((len(rows), seqlen), IGNORED)
    for i, (tokens, wanted) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        targets[i, : len(wanted)] = torch.tensor(wanted)
    return Rows(ids, targets)
