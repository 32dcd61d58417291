"""What is kept between runs: converted files, evaluations, calibration statistics. Safe to delete at any time."""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.beside import CODE, INDEX, files_in_folders, is_beside
from lrcompress.folders import cache_folder, named_cache_folder
from lrcompress.kernels import native

CONVERTED, EVALUATIONS, STATISTICS = "converted", "evaluations", "statistics"
KINDS = (CONVERTED, EVALUATIONS, native.FOLDER, STATISTICS)
OWN = {
    CONVERTED: re.compile(r"[0-9a-f]{16}|\.converting-\w+"),
    EVALUATIONS: re.compile(r"[0-9a-f]{32}\.json|\.\w+\.tmp"),
    native.FOLDER: re.compile(r"\w+-[0-9a-f]{24}\.so|\.compiling-\w+"),
    STATISTICS: re.compile(r"[0-9a-f]{32}"),
}
"""Names that we give; whatever else lies in a named folder is somebody's."""
LABEL = "label.json"
"""Of an entry that is a folder, where it is no conversion."""

WEIGHTS = ".safetensors"
WRITTEN_ABOUT = ("report.json", "plan.json")
"""Our notes on how a checkpoint was made: no part of the model."""


_lent: list[Path] = []


@contextlib.contextmanager
def statistics_kept_in(folder: Path) -> Iterator[None]:
    """While open, calibration statistics are kept in `folder` where no cache is named: several runs of one process."""
    _lent.append(folder)
    try:
        yield
    finally:
        _lent.pop()


def statistics_folder() -> Path | None:
    """Where calibration statistics are kept between runs, None where they are not: they are large."""
    named = named_cache_folder()
    return named / STATISTICS if named is not None else _lent[-1] if _lent else None


def conversion_folder(paths: Iterable[Path], reading: int) -> Path:
    """The folder for what the parts of a file were converted to, by their places, sizes and times of change.

    `reading` is the number of the way they are read: what another one made is not found.
    """
    stats = [(path.resolve(), path.stat()) for path in paths]
    key = f"{reading} {[(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]}"
    return cache_folder() / CONVERTED / hashlib.sha256(key.encode()).hexdigest()[:16]


def content_digest(folder: Path) -> str:
    """Of everything that a model and its tokenizer are read from; equal for equal bytes, wherever they lie."""
    return files_digest(files_read(folder))


def is_read(path: Path) -> bool:
    """Whether a model or its tokenizer is read from `path`."""
    read = path.suffix in (WEIGHTS, CODE) or path.name.endswith(INDEX) or is_beside(path)
    return read and path.name not in WRITTEN_ABOUT and path.is_file()


def files_read(folder: Path) -> list[Path]:
    """The files that a model and its tokenizer are read from, in a fixed order."""
    return [*filter(is_read, sorted(folder.iterdir())), *files_in_folders(folder)]


def files_digest(paths: Iterable[Path]) -> str:
    """Of files by name and content."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of what is in a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recall(key: dict[str, Any]) -> Any:
    """The value noted under `key`; None where there is none, or none that can be read."""
    try:
        entry = json.loads(_file(key).read_text(encoding="utf8"))
        return entry["value"] if entry["key"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note(key: dict[str, Any], label: str, value: Any) -> None:
    """Keep a JSON value, whole or not at all; a folder that cannot be written costs time later, nothing now."""
    path = _file(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".", suffix=".tmp", encoding="utf8", delete=False
        ) as file:
            json.dump({"key": key, "label": label, "value": value}, file)
        Path(file.name).replace(path)


@dataclass(frozen=True)
class Entry:
    """kind: converted, evaluations, kernels or statistics; label: what it is, for people."""

    kind: str
    path: Path
    label: str
    bytes: int


def entries() -> list[Entry]:
    """What the cache holds."""
    found = []
    for kind in KINDS:
        folder = cache_folder() / kind
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if not OWN[kind].fullmatch(path.name):
                continue
            files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            found.append(Entry(kind, path, _label(path), sum(p.stat().st_size for p in files)))
    return found


def clear() -> list[Entry]:
    """Delete what the cache holds, and nothing else in its folder; returns what that was."""
    gone = entries()
    for entry in gone:
        if entry.path.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            entry.path.unlink(missing_ok=True)
    for kind in KINDS:
        with contextlib.suppress(OSError):  # somebody's files are in it, or it is not there
            (cache_folder() / kind).rmdir()
    return gone


def _file(key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / EVALUATIONS / f"{name}.json"


def _label(path: Path) -> str:
    if path.is_dir() and path.parent.name == CONVERTED:
        return "GGUF, dequantised"
    if path.parent.name == native.FOLDER:
        return f"{path.name.split('-')[0]}, compiled"
    try:
        return str(json.loads((path / LABEL if path.is_dir() else path).read_text(encoding="utf8"))["label"])
    except (OSError, ValueError, KeyError, TypeError):
        return "not readable"
