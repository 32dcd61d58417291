"""Opening a model, compressed or dense, to run it whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import lrcompress  # noqa: F401 (registers the stored formats)
from lrcompress.checkpoint.folder import load_tokenizer, read_sound_config
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError, ResourceError
from lrcompress.foreign.opening import open_model
from lrcompress.model.device import compute_dtype, out_of_memory, resolve_device, resolve_dtype
from lrcompress.model.limits import guard_tokens
from lrcompress.model.skeleton import auto_class, empty_model
from lrcompress.report.summary import load_report


@dataclass
class LoadedModel:
    """label: as the user named it; report: report.json where it is one of ours."""

    label: str
    folder: Path
    model: nn.Module
    tokenizer: Any
    report: dict[str, Any] | None


def load_model(
    label: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """The model on `device`, which refuses tokens that it does not know, with its tokenizer; see `load_network`."""
    folder, model = load_network(label, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    guard_tokens(model, label)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return LoadedModel(label, folder, model, tokenizer, load_report(folder))


def load_network(
    label: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Path, nn.Module]:
    """Folder and model on `device`; dtype `auto` is float32 on CPU and the checkpoint's own elsewhere."""
    import torch
    from safetensors import SafetensorError

    folder = open_model(label).folder
    config = read_sound_config(folder, trust_remote_code=trust_remote_code)
    where = resolve_device(device)
    wanted: Any = compute_dtype(where, torch.bfloat16) if dtype == "auto" else resolve_dtype(dtype, torch.float32)
    if dtype == "auto" and wanted != torch.float32:
        wanted = "auto"
    try:
        model, info = _from_files(folder, config, wanted, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise ResourceError(f"out of memory while model {label} was loaded") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {label} cannot be loaded ({reason})") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[:3])
        raise InputError(f"model {label} lacks weights ({names}): its files and its config do not belong together")
    return folder, model.to(where).eval()


def _from_files(folder: Path, config: Any, dtype: Any, *, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model and what transformers notes about its loading; weights in fp8 as they are read for compression.

    transformers takes blocks of fp8 for equal parts of a weight, and those at its edge may be cut.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    files = CheckpointReader(folder)
    if not files.in_fp8:
        options |= {"trust_remote_code": trust_remote_code, "use_safetensors": True}
        found: tuple[nn.Module, dict[str, Any]] = auto_class(config).from_pretrained(folder, **options)
        return found
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind: Any = type(empty_model(config, trust_remote_code=trust_remote_code))
    found = kind.from_pretrained(None, config=config, state_dict=dict(files.read(files.names())), **options)
    return found
