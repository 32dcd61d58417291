"""Calibration and evaluation text: where it comes from and how it becomes blocks of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.calibration.chats import SYSTEM, TEXT, TOOLS, chat_of, rendered
from lrcompress.calibration.files import PARQUET, holds_records, kind_of, read_records, read_text
from lrcompress.calibration.pictures import IMAGES, first_with_images
from lrcompress.errors import InputError
from lrcompress.model.skeleton import library_errors

HELD_OUT = 10
"""One part in this many of a source is held out: its end, never calibrated on."""
JOIN = "\n\n"
"""Between the texts of a source."""
BAD_TOKENIZER = (
    "the text cannot be tokenised",
    "are the model's tokenizer files whole, and is the text valid Unicode?",
)
BUILT_IN = ("wikitext2", "c4", "python-docs", "self")
NARROW = {"python-docs": "Python's documentation (python-docs)", "self": "text of the model's own (self)"}
"""Built-in sources that are not what most models will read, in words."""


@dataclass(frozen=True)
class Source:
    """One calibration SPEC: a built-in name or a path, the field of its records, its share of the samples."""

    name: str
    field: str = TEXT
    weight: float = 1.0

    @property
    def path(self) -> Path | None:
        """The file, None for a built-in source."""
        return None if self.name in BUILT_IN else Path(self.name)


def parse_source(spec: str) -> Source:
    """As `split_source`; a file that does not exist is an InputError."""
    source = split_source(spec)
    if source.path is not None and not source.path.is_file():
        raise InputError(f"text {source.name} does not exist: give a file or one of {', '.join(BUILT_IN)}")
    return source


def narrow_text(sources: Sequence[Source], option: str) -> str | None:
    """A word of caution where a source is not general text; `option` names a better one."""
    names = dict.fromkeys(NARROW[source.name] for source in sources if source.name in NARROW)
    if not names:
        return None
    return f"reading {' and '.join(names)}, which is not general text: give your own with {option} YOUR.txt"


def split_source(spec: str) -> Source:
    """`NAME`, `PATH`, `PATH:field` where that holds records, each with `*WEIGHT`, apart; without a look at the disk."""
    text, star, share = spec.rpartition("*")
    weight = 1.0
    if star:
        try:
            weight = float(share)
        except ValueError:
            text = spec
        if not 0 < weight < math.inf:
            raise InputError(f"calibration {spec!r}: the weight after * must be a number above zero")
    else:
        text = spec
    name, field = text, TEXT
    head, colon, tail = text.rpartition(":")
    if colon and holds_records(Path(head)):
        name, field = head, tail
    return Source(name, field, weight)


def sampled_last(sources: Sequence[Source]) -> list[int]:
    """The places of the sources in the order to read them: what a model must write first takes minutes, a file that is
    too short shows at once."""
    return sorted(range(len(sources)), key=lambda place: sources[place].name == "self")


def documents(
    source: Source, split: str = "train", tokenizer: Any = None, records: Sequence[Any] | None = None
) -> list[str]:
    """The texts of a source; a plain file is one document, taken as it is. `split` is that of a hub data set.

    Records that are chats become what the chat template of `tokenizer` makes of them. `records` are those of a source's
    file, where they have been read already.
    """
    if source.name == "python-docs":
        from pydoc_data.topics import topics

        return [topics[key] for key in sorted(topics)]
    if source.name == "wikitext2":
        return ["\n\n".join(_hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split))]
    if source.name == "c4":
        return _hub_rows("allenai/c4", "en", split, limit=4000)
    if source.path is None:
        raise InputError(f"source {source.name!r} is sampled from a model and has no documents")
    if not holds_records(source.path):
        return [read_text(source.path)]
    records = records_of(source) if records is None else records
    if (first := first_with_images(records)) is not None:
        raise InputError(
            f"record {first} of {source.path} has an image, and only text is read here: write the text to a file of "
            "its own"
        )
    return _record_texts(source.path, source.field, records, tokenizer)


def records_of(source: Source) -> list[Any]:
    """What a source's file of records holds; nothing of another source."""
    if source.path is None or not holds_records(source.path):
        return []
    return read_records(source.path, (source.field, SYSTEM, TOOLS, *IMAGES))


def _record_texts(path: Path, field: str, records: Sequence[Any], tokenizer: Any) -> list[str]:
    """The text of every record; rows of a .parquet that have none are left out."""
    opening: str | None = None
    texts = []
    for number, record in enumerate(records, 1):
        value = record if isinstance(record, str) else record.get(field) if isinstance(record, dict) else None
        if isinstance(value, str):
            texts.append(value)
            continue
        try:
            chat = chat_of(record, field) if isinstance(record, dict) else None
        except InputError as error:
            raise InputError(f"record {number} of {path}: {error}") from error
        if chat is not None:
            opening = _opening(path, tokenizer) if opening is None else opening
            what = f"the model's chat template cannot write record {number} of {path}"
            with library_errors(what, "mend its roles, or write it as text into a field of its own"):
                texts.append(rendered(chat, tokenizer, opening))
        elif kind_of(path) in PARQUET and field in record:
            if value is not None:
                raise InputError(
                    f"{path} has no text in column {field!r} but {type(value).__name__}: write {path}:FIELD"
                )
        else:
            known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise InputError(
                f"{path} has a record without the text field {field!r} (it has: {known}): write {path}:FIELD"
            )
    return texts


def _opening(path: Path, tokenizer: Any) -> str:
    """What a chat template writes first and every block of tokens begins with: BOS, where the tokenizer adds it."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{path} holds chats, and the model's tokenizer has no chat template: put its chat_template.jinja beside "
            "it, or write the chats as text, a field of every record"
        )
    return str(tokenizer.bos_token) if bos_prefix(tokenizer) else ""


def _hub_rows(path: str, config: str, split: str, limit: int | None = None) -> list[str]:
    """The `text` column of a hub data set; InputError where the hub cannot be reached."""
    import datasets

    try:
        data = datasets.load_dataset(path, config, split=split, streaming=limit is not None)
        rows = data if limit is None else data.take(limit)
        return [row["text"] for row in rows]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"data set {path} cannot be loaded ({reason}): use a local file or python-docs") from error


def bos_prefix(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer begins a text with it, else []."""
    bos = tokenizer.bos_token_id
    with library_errors(*BAD_TOKENIZER):
        return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def tokenise(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """(n,) int64 tokens of the texts joined by blank lines, without special tokens."""
    with library_errors(*BAD_TOKENIZER):
        ids = tokenizer(JOIN.join(texts), add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def cut_blocks(ids: Tensor, seqlen: int, prefix: Sequence[int]) -> Tensor:
    """(blocks, seqlen) disjoint blocks, each beginning with `prefix`; a last partial block is dropped."""
    step = seqlen - len(prefix)
    count = len(ids) // step
    body = ids[: count * step].reshape(count, step)
    head = torch.tensor(list(prefix), dtype=ids.dtype).expand(count, len(prefix))
    return torch.cat([head, body], dim=1)


def split_held_out(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The part to calibrate on and the held-out last tenth."""
    cut = len(ids) - len(ids) // HELD_OUT
    return ids[:cut], ids[cut:]


def held_out_documents(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """What `split_held_out` holds out of the texts' tokens, as text: all behind the last character to calibrate on."""
    with library_errors(*BAD_TOKENIZER):
        encoded = tokenizer(
            JOIN.join(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast
        )
    read, held = split_held_out(torch.tensor(encoded.input_ids, dtype=torch.int64))
    if not tokenizer.is_fast:  # it does not say where its tokens stand
        return [tokenizer.decode(held, clean_up_tokenization_spaces=False)] if len(held) else []
    end = encoded["offset_mapping"][len(read) - 1][1] if len(read) else 0
    kept = []
    for text in texts:
        kept.append(text[max(0, end) :])
        end -= len(text) + len(JOIN)
    return [text for text in kept if text]


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """`samples` split in proportion to `weights`: whole numbers that add up, the largest remainders rounded up."""
    total = sum(weights)
    if not math.isfinite(total):
        raise InputError(f"the sources' weights add up to {total:g}: use smaller ones")
    exact = [w / total * samples for w in weights]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    return counts
