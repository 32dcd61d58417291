"""What lies beside a model's weights: the files of its tokenizer, its processor and its generation."""

from collections.abc import Iterator
from pathlib import Path

from lrcompress.errors import InputError

SUFFIXES = (
    ".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe", ".codes", ".tokenizer",
)  # fmt: skip
VERSIONED = "tokenizer.model."
"""Begins a tokenizer's file that ends in its version, such as tokenizer.model.v3."""
CODE, INDEX = ".py", ".index.json"

_MARKS = ("*.jinja", "*tokenizer_config.json", "*processor_config.json")
"""What a folder of further chat templates, tokenizers or processors holds one of at least."""


def is_beside(path: Path) -> bool:
    """Whether a file of this name may belong to a tokenizer, a processor or a generation config; an index does not."""
    name = path.name
    return (path.suffix in SUFFIXES or name.startswith(VERSIONED)) and not name.endswith(INDEX)


def files_in_folders(folder: Path) -> Iterator[Path]:
    """The files of those folders in `folder` that hold such files alone, as `additional_chat_templates` does."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        try:
            found = sorted(inner.iterdir())
        except PermissionError as error:
            raise InputError(f"{inner} cannot be read ({error.strerror})") from error
        marked = any(path.match(mark) for path in found for mark in _MARKS)
        if marked and all(path.is_file() and is_beside(path) for path in found):
            yield from found
