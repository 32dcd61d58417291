"""Where things are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """LRCOMPRESS_CACHE, else lrcompress in the user's cache folder."""
    named = named_cache_folder()
    if named is not None:
        return named
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrcompress"


def named_cache_folder() -> Path | None:
    """LRCOMPRESS_CACHE, which --cache sets, or None: there alone what is large is kept."""
    named = os.environ.get("LRCOMPRESS_CACHE")
    return Path(named).expanduser() if named else None
