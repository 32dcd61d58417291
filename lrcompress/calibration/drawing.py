"""Samples to calibrate on, drawn from sources of text and of images beside text."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.calibration.corpus import (
    HELD_OUT,
    Source,
    bos_prefix,
    cut_blocks,
    documents,
    records_of,
    sampled_last,
    split_held_out,
    tokenise,
)
from lrcompress.calibration.own_text import sample_from_model
from lrcompress.calibration.pictures import Looker, Row, check_files, first_with_images, row_of
from lrcompress.errors import InputError
from lrcompress.model.samples import Sample, as_rows, samples_of

MOST_HELD_OUT, SAMPLES_A_WINDOW = 4, 8
"""Held-out windows a source that the result is judged by: one for so many calibration samples."""


def windows_for(samples: int) -> int:
    """Held-out windows of a source of so many samples; it may have less text."""
    return min(MOST_HELD_OUT, max(1, samples // SAMPLES_A_WINDOW))


@dataclass(frozen=True)
class Calibration:
    """samples: to gather statistics on; unseen: held-out windows of every source; length: the longest may have.

    notes: what to say of how they were made; pictures: the digest of what image files held, by the source that names
    them.
    """

    samples: list[Sample]
    unseen: list[Sample]
    length: int
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> Tensor:
        """(samples, length) int64 tokens, of text alone."""
        return as_rows(self.samples, self.length)

    @property
    def held_out(self) -> Tensor:
        """(windows, length) int64 tokens, of text alone."""
        return as_rows(self.unseen, self.length)

    @property
    def tokens(self) -> int:
        """Of the samples together, what keeps an image's place among them."""
        return sum(map(len, self.samples))

    @property
    def images(self) -> int:
        """That the samples hold."""
        return sum(sample.images for sample in self.samples)

    def digest(self) -> str:
        """sha256 of the calibration tokens, and of what was read of the images."""
        found = hashlib.sha256()
        for sample in self.samples:
            found.update(sample.ids.to(torch.int64).numpy().tobytes() + sample.digest.encode())
        return found.hexdigest()


def calibration_blocks(
    sources: Iterable[tuple[Source, int, int]],
    tokenizer: Any,
    seed: int,
    folder: Path,
    held_out_windows: int | None = None,
    *,
    trust_remote_code: bool = False,
    looker: Callable[[str], Looker] | None = None,
) -> Calibration:
    """Blocks of every (source, samples, seqlen), drawn without replacement by `seed`; of one with images, its rows.

    All sources must have one seqlen. `folder` is the dense model's, for the source `self`. A source that is too short
    is an InputError that says how many tokens there are. looker(which) reads records with images, of which `which` is
    one; without it they are an InputError.
    """
    asked, notes, longest = list(sources), list[str](), 1
    pictures = dict[str, str]()
    drawn_by = dict[int, tuple[list[Sample], list[Sample]]]()
    for place in sampled_last([source for source, _, _ in asked]):
        source, samples, seqlen = asked[place]
        windows = held_out_windows or windows_for(samples)
        records = records_of(source)
        if looker is not None and (first := first_with_images(records)) is not None:
            drawn = drawn_rows(source, records, samples, windows, seed)
            reader = looker(f"record {first} of {source.path}")
            pictures[source.name] = _images_digest(drawn)
            found = _look(reader, source, drawn, seqlen, notes)
        elif source.name == "self":
            blocks = sample_from_model(
                folder, tokenizer, samples + windows, seqlen, seed, trust_remote_code=trust_remote_code
            )
            found = samples_of(blocks[:samples]), samples_of(blocks[samples:])
        else:
            texts = documents(source, tokenizer=tokenizer, records=records)
            found = _blocks(source, texts, samples, windows, seqlen, tokenizer, seed)
        drawn_by[place] = found
        longest = max(longest, seqlen)
    chosen, held_out = ([sample for place in sorted(drawn_by) for sample in drawn_by[place][part]] for part in (0, 1))
    return Calibration(chosen, held_out, longest, notes, pictures)


def _blocks(
    source: Source, texts: Sequence[str], samples: int, windows: int, seqlen: int, tokenizer: Any, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Blocks of the texts, and held-out ones."""
    calibrate, held = split_held_out(tokenise(texts, tokenizer))
    prefix = bos_prefix(tokenizer)
    blocks = cut_blocks(calibrate, seqlen, prefix)
    if len(blocks) < samples:
        raise InputError(
            f"calibration text {source.name} is too short: {len(calibrate)} tokens after holding out a tenth, "
            f"{samples} x {seqlen} asked: use fewer --samples, a shorter --seqlen or more text"
        )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:samples]
    return samples_of(blocks[order.sort().values]), samples_of(cut_blocks(held, seqlen, prefix)[:windows])


def drawn_rows(
    source: Source, records: Sequence[Any], samples: int, windows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """`samples` rows with images, drawn by `seed`, and the first `windows` of the last tenth, which is held out."""
    assert source.path is not None
    count = len(records) - len(records) // HELD_OUT
    if count < samples:
        raise InputError(
            f"calibration data {source.name} is too short: {count} records after holding out a tenth, {samples} asked: "
            "use fewer --samples or more records"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples].sort().values.tolist()
    held = list(range(count, len(records)))[:windows]
    chosen, judged = (
        [row_of(source.path, source.field, place + 1, records[place]) for place in places] for places in (order, held)
    )
    return chosen, judged


def images_drawn(source: Source, samples: int, windows: int, seed: int) -> str:
    """The digest that `calibration_blocks` makes of the source's image files; "" where it has no images."""
    records = records_of(source)
    if first_with_images(records) is None:
        return ""
    return _images_digest(drawn_rows(source, records, samples, windows, seed))


def _images_digest(drawn: tuple[list[Row], list[Row]]) -> str:
    """sha256 of what the image files of rows hold; nothing of those that are not there."""
    digest = hashlib.sha256()
    for image in (image for rows in drawn for row in rows for image in row.images):
        content = image if isinstance(image, bytes) else image.read_bytes() if image.is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _look(
    reader: Looker, source: Source, drawn: tuple[list[Row], list[Row]], seqlen: int, notes: list[str]
) -> tuple[list[Sample], list[Sample]]:
    """A sample of every row; what there is to say of them goes to `notes`."""
    for row in (row for rows in drawn for row in rows):  # before the first of them takes its time
        check_files(row)
    chosen, judged = ([reader.sample(row, seqlen) for row in rows] for rows in drawn)
    if chosen:
        lengths, images = [len(sample) for sample, _ in chosen], sum(sample.images for sample, _ in chosen)
        notes.append(
            f"{source.name}: {len(chosen)} records with {images} images, of {min(lengths)} to {max(lengths)} tokens"
        )
    if longer := sum(cut for _, cut in chosen + judged):
        notes.append(f"{source.name}: {longer} records are longer than {seqlen} tokens, their ends are left out")
    return [sample for sample, _ in chosen], [sample for sample, _ in judged]


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
            found.append(
                cut_blocks(
                    split_held_out(tokenise(documents(source, tokenizer=tokenizer), tokenizer))[1], seqlen, prefix
                )[:most]
            )
    return torch.cat(found)
