"""Which base --base names: a SPEC to compute one by, or the folder of an existing checkpoint."""

from pathlib import Path

from lrcompress.bases.base import BASES, Base, BaseOptions
from lrcompress.bases.existing import Existing
from lrcompress.errors import InputError


def is_computed(text: str) -> bool:
    """Whether --base TEXT names a base that is computed; else it is the folder of an existing checkpoint."""
    return text.split(":")[0] in BASES.names()


def parse_base(text: str, options: BaseOptions | None = None) -> Base:
    """The base that a SPEC such as rtn:4:64, or the folder of a checkpoint, names; InputError otherwise."""
    options = options or BaseOptions()
    path = Path(text).expanduser()
    if not is_computed(text) and path.is_dir():
        return Existing(text, options)
    if not is_computed(text) and (path.exists() or "/" in text or text.startswith((".", "~"))):
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"base {text} {what}: give the folder of a compressed checkpoint, or a SPEC such as rtn:4:64")
    name, *arguments = text.split(":")
    return BASES.get(name)(arguments, options)
