"""Calibration and evaluation text: where it comes from and how it becomes blocks of tokens."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.model.skeleton import auto_class, library_errors, read_config

MOST_HELD_OUT, SAMPLES_A_WINDOW = 2, 32
"""Held-out windows a source that the result is judged by: one for so many calibration samples."""

HELD_OUT = 10
"""One part in this many of a source is held out: its end, never calibrated on."""
JOIN = "\n\n"
"""Between the texts of a source."""
BAD_TOKENIZER = (
    "the text cannot be tokenised",
    "are the model's tokenizer files whole, and is the text valid Unicode?",
)
BUILT_IN = ("wikitext2", "c4", "python-docs", "self")


@dataclass(frozen=True)
class Source:
    """One calibration SPEC: a built-in name or a path, the field of its records, its share of the samples."""

    name: str
    field: str = "text"
    weight: float = 1.0

    @property
    def path(self) -> Path | None:
        """The file, None for a built-in source."""
        return None if self.name in BUILT_IN else Path(self.name)


@dataclass(frozen=True)
class Calibration:
    """ids: (samples, seqlen) int64 to gather statistics on; held_out: (windows, seqlen), one or two a source."""

    ids: Tensor
    held_out: Tensor

    def digest(self) -> str:
        """sha256 of the calibration tokens."""
        return hashlib.sha256(self.ids.to(torch.int64).numpy().tobytes()).hexdigest()


def parse_source(spec: str) -> Source:
    """As `split_source`; a file that does not exist is an InputError."""
    source = split_source(spec)
    if source.path is not None and not source.path.is_file():
        raise InputError(f"calibration text {source.name} does not exist: give a file or one of {', '.join(BUILT_IN)}")
    return source


def split_source(spec: str) -> Source:
    """`NAME`, `PATH`, `PATH.jsonl:field`, each with `*WEIGHT`, taken apart without a look at the disk."""
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
    name, field = text, "text"
    head, colon, tail = text.rpartition(":")
    if colon and head.endswith((".jsonl", ".parquet")):
        name, field = head, tail
    return Source(name, field, weight)


def documents(source: Source, split: str = "train") -> list[str]:
    """The texts of a source; a plain file is one document, taken as it is. `split` is that of a hub data set."""
    if source.name == "python-docs":
        from pydoc_data.topics import topics

        return [topics[key] for key in sorted(topics)]
    if source.name == "wikitext2":
        return ["\n\n".join(_hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split))]
    if source.name == "c4":
        return _hub_rows("allenai/c4", "en", split, limit=4000)
    if source.path is None:
        raise InputError(f"source {source.name!r} is sampled from a model and has no documents")
    return _file_documents(source.path, source.field)


def _file_documents(path: Path, field: str) -> list[str]:
    try:
        if path.suffix == ".jsonl":
            return [_field(record, field, path) for record in read_records(path)]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            if field not in table.column_names:
                raise InputError(f"{path} has no column {field!r}: it has {', '.join(table.column_names)}")
            return _texts(table.column(field).to_pylist(), field, path)
        with path.open(encoding="utf8", newline="") as file:
            return [file.read()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_records(path: Path) -> list[Any]:
    """The values of a .jsonl, one a line; ValueError and OSError where it is none."""
    # Lines end where JSON's do: str.splitlines also breaks at characters that a string may hold as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf8").split("\n") if line.strip()]


def _texts(values: Sequence[Any], field: str, path: Path) -> list[str]:
    """Those of a column that are there; what is neither a text nor nothing is an InputError."""
    found = [value for value in values if value is not None]
    other = next((value for value in found if not isinstance(value, str)), None)
    if other is not None:
        raise InputError(f"{path} has no text in column {field!r} but {type(other).__name__}: write {path}:FIELD")
    return found


def _field(record: Any, field: str, path: Path) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{path} has a record without the text field {field!r} (it has: {known}): write {path}:FIELD")
    return str(record[field])


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


def calibration_blocks(
    sources: Iterable[tuple[Source, int, int]],
    tokenizer: Any,
    seed: int,
    folder: Path,
    held_out_windows: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> Calibration:
    """Blocks of every (source, samples, seqlen), drawn without replacement by `seed`.

    All sources must have one seqlen. `folder` is the dense model's, for the source `self`. A source that is too short
    is an InputError that says how many tokens there are.
    """
    chosen, held_out = [], []
    prefix = bos_prefix(tokenizer)
    for source, samples, seqlen in sources:
        windows = held_out_windows or min(MOST_HELD_OUT, max(1, samples // SAMPLES_A_WINDOW))
        if source.name == "self":
            count = samples + windows
            blocks = sample_from_model(folder, tokenizer, count, seqlen, seed, trust_remote_code=trust_remote_code)
            chosen.append(blocks[:samples])
            held_out.append(blocks[samples:])
            continue
        calibrate, held = split_held_out(tokenise(documents(source), tokenizer))
        blocks = cut_blocks(calibrate, seqlen, prefix)
        if len(blocks) < samples:
            raise InputError(
                f"calibration text {source.name} is too short: {len(calibrate)} tokens after holding out a tenth, "
                f"{samples} x {seqlen} asked: use fewer --samples, a shorter --seqlen or more text"
            )
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:samples]
        chosen.append(blocks[order.sort().values])
        held_out.append(cut_blocks(held, seqlen, prefix)[:windows])
    return Calibration(torch.cat(chosen), torch.cat(held_out))


def held_out_blocks(
    sources: Iterable[tuple[Source, int, int]],
    tokenizer: Any,
    seed: int,
    folder: Path,
    most: int,
    *,
    trust_remote_code: bool = False,
) -> Tensor:
    """(windows, seqlen): at most the first `most` held-out windows of every source; of `self`, text of its own."""
    found, prefix = [], bos_prefix(tokenizer)
    for source, _, seqlen in sources:
        if source.name == "self":
            made = sample_from_model(folder, tokenizer, most, seqlen, seed + 1, trust_remote_code=trust_remote_code)
            found.append(made)
        else:
            found.append(cut_blocks(split_held_out(tokenise(documents(source), tokenizer))[1], seqlen, prefix)[:most])
    return torch.cat(found)


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


@torch.no_grad()
def sample_from_model(
    folder: Path, tokenizer: Any, samples: int, seqlen: int, seed: int, *, trust_remote_code: bool = False
) -> Tensor:
    """(samples, seqlen) tokens drawn from the dense model at temperature 1; needs the whole model in memory."""
    auto = auto_class(read_config(folder, trust_remote_code=trust_remote_code))
    with library_errors("the model cannot write text of its own", "use shorter blocks or a text file"):
        model = auto.from_pretrained(folder, use_safetensors=True, trust_remote_code=trust_remote_code).eval()
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        ids = torch.full((samples, 1), start or 0, dtype=torch.int64)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                min_new_tokens=seqlen - 1,
                max_new_tokens=seqlen - 1,
                pad_token_id=start or 0,
            )
    return made[:, :seqlen].to(torch.int64)
