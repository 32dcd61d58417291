"""Records with images beside text, as a multimodal model's own processor reads them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.calibration.chats import CHATS, Chat, chat_of
from lrcompress.errors import InputError
from lrcompress.model.samples import Sample
from lrcompress.model.skeleton import library_errors

IMAGES = ("image", "images")
"""Fields of a record that name image files."""
FILES = ("image", "path", "url")
"""Keys of a message's image part that name its file, as transformers has them."""
MARK = "<image>"
"""What records write where an image belongs."""
TEXT_ONLY = "write the text to a file of its own, or name a model that reads images"


@dataclass(frozen=True)
class Row:
    """One record. where: for errors; said: its text, or a chat whose parts say where images belong; images: files,
    or what is in them, in order."""

    where: str
    said: str | Chat
    images: list[Path | bytes]


def first_with_images(records: Sequence[Any]) -> int | None:
    """The number, from 1, of the first record that has an image; None where none has."""
    return next((number for number, record in enumerate(records, 1) if _has_images(record)), None)


def _has_images(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    chats = [record[name] for name in CHATS if isinstance(record.get(name), list)]
    turns = [turn for chat in chats for turn in chat if isinstance(turn, dict)]
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    return any(record.get(name) for name in IMAGES) or any(map(_is_image, parts))


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def row_of(path: Path, field: str, number: int, record: Any) -> Row:
    """Record `number`, from 1, of file `path`; InputError where it has no text or no place for an image."""
    where = f"record {number} of {path}"
    if not isinstance(record, dict):
        raise InputError(f"{where} is {type(record).__name__}, no text with images")
    try:
        images = [_file(value, path.parent) for value in _named(record)]
        text = record.get(field)
        if isinstance(text, str) and text.strip():
            return Row(where, text, images)
        chat = chat_of(record, field)
        if chat is None:
            raise InputError(f"it has no text in field {field!r} (it has: {', '.join(record)}): write {path}:FIELD")
        return Row(where, *_with_places(chat, images, path.parent))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _named(record: Mapping[str, Any]) -> Iterator[Any]:
    for name in IMAGES:
        value = record.get(name)
        yield from value if isinstance(value, list) else [value] if value else []


def _file(value: Any, folder: Path) -> Path | bytes:
    """What a record names an image by: a path from its own file's folder on, or as data sets' tables keep it."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(f"an image is named by {type(value).__name__}: name its file")
    return folder / value


def _with_places(chat: Chat, images: list[Path | bytes], folder: Path) -> tuple[Chat, list[Path | bytes]]:
    """The chat in parts, and its images in their order: those that parts name, and in the other places the record's."""
    messages = [{**message, "content": parts_of(message["content"])} for message in chat.messages]
    places = [part for message in messages for part in message["content"] if _is_image(part)]
    if not places:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        places = [{"type": "image"} for _ in images]
        first["content"] = [*places, *first["content"]]
    own = [next((part[key] for key in FILES if part.get(key)), None) for part in places]
    if own.count(None) != len(images):
        raise InputError(f"it names {len(images)} images for {own.count(None)} places in its chat")
    left = iter(images)
    found = [next(left) if value is None else _file(value, folder) for value in own]
    for message in messages:
        message["content"] = [{"type": "image"} if _is_image(part) else part for part in message["content"]]
    return Chat(messages, chat.tools), found


def parts_of(content: Any) -> list[dict[str, Any]]:
    """A message's content as parts of text and images; InputError for those of other kinds."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not (_is_image(part) or isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise InputError(f"a message has a part of type {kind!r}: text and images alone are read")
        return content
    pieces, found = str(content or "").split(MARK), list[dict[str, Any]]()
    for place, piece in enumerate(pieces):
        found += [{"type": "image"}] * (place > 0)
        found += [{"type": "text", "text": piece.strip() if len(pieces) > 1 else piece}] * bool(piece.strip())
    return found


class Looker:
    """Reads rows by a model's `processor`; `places` are the tokens that keep an image's place."""

    def __init__(self, processor: Any, places: set[int]) -> None:
        self._processor, self._places = processor, torch.tensor(sorted(places), dtype=torch.int64)

    def sample(self, row: Row, seqlen: int) -> tuple[Sample, bool]:
        """The row's first `seqlen` tokens, and whether it has more; InputError where an image lies beyond them."""
        reads = self._reads(row)
        ids = reads["input_ids"][0].to(torch.int64)
        seen = torch.isin(ids, self._places)
        if row.images and not seen.any():
            raise InputError(
                f"{row.where}: the model's processor keeps no place among the tokens for its image: calibrate on text"
            )
        if seen[seqlen:].any():
            end = int(seen.nonzero().max()) + 1
            raise InputError(
                f"{row.where}: it takes {end} tokens to the end of its last image, --seqlen is {seqlen}: use a longer "
                "--seqlen or smaller images"
            )
        digest = hashlib.sha256()
        for name, value in sorted(reads.items()):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        look = partial(self._reads, row, seqlen)
        return Sample(ids[:seqlen], look, seen[:seqlen], digest.hexdigest(), len(row.images)), len(ids) > seqlen

    def _reads(self, row: Row, seqlen: int | None = None) -> dict[str, Any]:
        """What the model is called with for a row, or for its first tokens."""
        images = [_opened(row, image) for image in row.images]
        asked: dict[str, Any] = {"return_tensors": "pt"}
        said = self._worded(row)
        cure = "are there as many images as marks for them, and does the chat template know its roles?"
        with library_errors(f"{row.where} cannot be read by the model's processor", cure):
            if isinstance(said, str):
                found = self._processor(text=[said], images=[images] if images else None, **asked)
            else:
                left = iter(images)
                messages = [
                    {**m, "content": [{**p, "image": next(left)} if _is_image(p) else p for p in m["content"]]}
                    for m in said.messages
                ]
                found = self._processor.apply_chat_template(
                    [messages], tools=said.tools, tokenize=True, return_dict=True, **asked
                )
        length = found["input_ids"].shape[1]
        return {name: _cut(value, length, seqlen) for name, value in found.items()}

    def _worded(self, row: Row) -> str | Chat:
        """What the processor is asked to read: text with the model's own marks as it is, all else as a chat."""
        own = [getattr(self._processor, name, None) for name in ("image_token", "boi_token")]
        template = getattr(self._processor, "chat_template", None)
        if not isinstance(row.said, str):
            if not template:
                raise InputError(
                    f"{row.where} is a chat, and the model's processor has no chat template: put its "
                    "chat_template.jinja beside it, or write the chats as text"
                )
            return row.said
        if not row.images or any(mark in row.said for mark in own if isinstance(mark, str) and mark):
            return row.said
        if not template:
            return (own[0] or "") * len(row.images) + row.said
        parts = parts_of(row.said)
        if not any(map(_is_image, parts)):
            parts = [*({"type": "image"} for _ in row.images), *parts]
        if sum(map(_is_image, parts)) != len(row.images):
            raise InputError(f"{row.where}: it names {len(row.images)} images for other {MARK} marks in its text")
        return Chat([{"role": "user", "content": parts}])


def _cut(value: Any, length: int, seqlen: int | None) -> Any:
    """What says something of every token, for the first of them; all else as it is."""
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.shape[:2] == (1, length)
    return value[:, :seqlen] if whole else value


def check_files(row: Row) -> None:
    """InputError where a file that the row names is not there."""
    for image in row.images:
        if isinstance(image, Path) and not image.is_file():
            raise InputError(f"{row.where}: image {image} does not exist: name it from the folder of that file on")


def _opened(row: Row, image: Path | bytes) -> Any:
    from PIL import Image, ImageOps

    named = "its image" if isinstance(image, bytes) else f"image {image}"
    with library_errors(f"{row.where}: {named} cannot be read", "is it a whole picture?"):
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
