"""Where converted files are kept between runs."""

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """LRCOMPRESS_CACHE, else lrcompress in the user's cache folder; safe to delete at any time."""
    named = os.environ.get("LRCOMPRESS_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrcompress"


def conversion_folder(path: Path) -> Path:
    """The folder for what file `path` was converted to, by its place, size and time of change."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return cache_folder() / "converted" / hashlib.sha256(key.encode()).hexdigest()[:16]
