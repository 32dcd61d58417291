"""Fetching a model from the hub, and what to tell where it does not come."""

import contextlib
import os
from pathlib import Path

from lrcompress.checkpoint.beside import CODE, SUFFIXES, VERSIONED
from lrcompress.errors import InputError, did_you_mean
from lrcompress.model.skeleton import library_errors

HUB_FILES = ("*.safetensors", *(f"*{suffix}" for suffix in (*SUFFIXES, CODE)), f"*{VERSIONED}*")


def download(model: str) -> Path:
    """The files of a repository of the hub; InputError, with the cure, where there are none."""
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


def similar(model: str) -> str:
    """A question that names a model here whose name is nearly MODEL's; "" where there is none."""
    path, known = Path(model), ["demo"] if "/" not in model else []
    with contextlib.suppress(OSError, ValueError):
        models = [found for found in path.parent.iterdir() if found.suffix == ".gguf" or found.is_dir()]
        known += [str(found) for found in models if not found.name.startswith(".")]
    return did_you_mean(model, known)


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
            f"model {model} is neither a local folder or .gguf file nor a repository of the hub ({status}): "
            f"{similar(model) or 'check the name, and log in with `hf auth login` if it is private'}"
        )
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    hint = similar(model) or "check the name"
    return f"model {model} is neither a local folder or .gguf file nor reachable on the hub{offline}: {hint}"


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
