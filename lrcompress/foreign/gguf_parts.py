"""Which files make a GGUF model: all parts of a split one, in order, and the models of a folder."""

import re
from pathlib import Path

from lrcompress.errors import InputError

PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""Names that llama.cpp's gguf-split gives."""
PROJECTOR = "mmproj"
"""Part of the names of files that hold no language model but what makes pictures its input."""
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def stem_of(name: str) -> str:
    """The name of a file without .gguf and without its number among the parts."""
    part = PART.fullmatch(name)
    return part["stem"] if part else name.removesuffix(".gguf")


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that the file `path` is a part of, in order; InputError where one is missing."""
    part = PART.fullmatch(path.name)
    if part is None:
        return [path]
    count = int(part["count"])
    if not 1 <= int(part["number"]) <= count:
        raise InputError(f"{path} is named as part {int(part['number'])} of {count}: give it its own name back")
    present = {found["number"]: file for file in path.parent.iterdir() if (found := _same_model(part, file.name))}
    missing = [number for number in range(1, count + 1) if f"{number:05d}" not in present]
    if missing:
        name = f"{part['stem']}-{missing[0]:05d}-of-{part['count']}.gguf"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path} is one of {count} parts, and {name}{more} is not beside it: download all parts")
    return [present[f"{number:05d}"] for number in range(1, count + 1)]


def only_gguf(folder: Path) -> Path | None:
    """The one GGUF model of a folder without other weights, None for none; InputError where there are several."""
    if any(any(folder.glob(pattern)) for pattern in OTHER_WEIGHTS):
        return None
    files = sorted(path for path in folder.glob("*.gguf") if path.is_file() and PROJECTOR not in path.name)
    models = {stem_of(path.name): path for path in reversed(files)}
    if len(models) > 1:
        names = ", ".join(path.name for path in sorted(models.values())[:4])
        raise InputError(f"{folder} holds {len(models)} GGUF models ({names}): pass the path of one of these files")
    return next(iter(models.values()), None)


def _same_model(part: re.Match[str], name: str) -> re.Match[str] | None:
    found = PART.fullmatch(name)
    same = found is not None and (found["stem"], found["count"]) == (part["stem"], part["count"])
    return found if same else None
