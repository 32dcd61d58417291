"""Which files of a folder hold the model's weights: in transformers' order, everywhere."""

import json
from pathlib import Path
from typing import Any

from lrcompress.errors import InputError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMED = "transformers_weights"
"""Key of config.json under which transformers looks for the name of another file or index."""


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers' from_pretrained reads; InputError where it would find none, or one is missing.

    What config.json names, else the single file, else the shards of the index.
    """
    chosen = _chosen(folder)
    if chosen is None:
        raise InputError(_nothing_to_read(folder))
    return _indexed(folder, chosen) if chosen.endswith(".json") else [folder / chosen]


def remark(folder: Path) -> str | None:
    """A line for the user where the folder offers its weights twice; None where there is no doubt."""
    chosen = _chosen(folder)
    found = [name for name in (WHOLE, INDEX) if name != chosen and (folder / name).is_file()]
    if chosen is None or not found:
        return None
    return f"{folder} holds {chosen} and {found[0]}: the first is read, as transformers does, the other is not"


def _chosen(folder: Path) -> str | None:
    """The file or index that transformers takes."""
    named = _named(folder)
    if named is not None:
        return named
    return next((name for name in (WHOLE, INDEX) if (folder / name).is_file()), None)


def _named(folder: Path) -> str | None:
    """What config.json names; a config that cannot be read is refused elsewhere."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf8"))
        named = config.get(NAMED)
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    if named is None:
        return None
    known = isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    if not known or Path(named).name != named or not (folder / named).is_file():
        raise InputError(f"{folder / 'config.json'} names {named!r} under {NAMED}: only files beside it can be read")
    return str(named)


def _indexed(folder: Path, name: str) -> list[Path]:
    index = folder / name
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise InputError(f"{index} is no index of shards ({type(error).__name__}: {error})") from error
    for shard in files:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index} names the file {shard!r}: only .safetensors files beside it are allowed")
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard} is missing, but {index.name} names it: download the checkpoint again")
    return [folder / shard for shard in files]


def _nothing_to_read(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if others:
        cure = f"rename {others[0]} to {WHOLE}" if len(others) == 1 else f"download {INDEX} too"
        return f"{folder} holds {others[0]}, but neither {WHOLE} nor {INDEX}, which transformers asks for: {cure}"
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    cure = "pickled weights are not read; convert them to safetensors" if pickled else "is it a checkpoint's folder?"
    return f"{folder} holds no .safetensors file: {cure}"
