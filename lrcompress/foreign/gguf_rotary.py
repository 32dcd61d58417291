"""Rotary embeddings of a GGUF file: its keys and tables as transformers' rope_parameters, checked on the model itself.

llama.cpp turns pair i of `rope.dimension_count` channels by position * base^(-2i/count) / table[i] / factor, with YaRN
by a mean of that with and without the factor (ggml/src/ggml-cpu/ops.cpp: rope_yarn; src/llama-context.cpp).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.foreign.gguf_metadata import CLOSE, ROTARY, Metadata, changes_nothing, head_width, rotates_by_kind

TABLE, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TABLES = (TABLE, LONG, SHORT)
"""Tensors of factors by which frequencies are divided: everywhere, or beyond and within the original context."""

READ = {
    "rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type",
    "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier", "rope.scaling.finetuned",
}  # fmt: skip
LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1, 3.2 and 3.3 has beside its factor; GGUF keeps only the table that follows."""
BASE = 10000.0
"""llama.cpp's where the file names none."""


@dataclass(frozen=True)
class Rotary:
    """parameters: an entry of rope_parameters; frequencies (pairs,): of short contexts; scale: of cos and sin."""

    parameters: dict[str, Any]
    frequencies: Tensor
    scale: float


def settle_rotary(config: Any, model: nn.Module, metadata: Metadata) -> bool:
    """Give `config` the file's rotary embedding where `model`, made from it, has another; whether that was so."""
    for key, value in metadata.values.items():
        if key.startswith(ROTARY) and key not in READ and not changes_nothing(key, value):
            raise metadata.refuse(key, "which is not known here")
    original = metadata.get("rope.scaling.original_context_length")
    if original and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original
    full, sliding = _meant(config, metadata)
    if agrees(model, full, sliding) and not {LONG, SHORT} & metadata.tables.keys():
        return False
    if rotates_by_kind(config):
        config.rope_parameters = {"full_attention": full.parameters, "sliding_attention": sliding.parameters}
    else:
        config.rope_parameters = full.parameters
    return True


def check_rotary(config: Any, model: nn.Module, metadata: Metadata) -> None:
    """InputError where `model`, made from `config`, does not turn as the file says."""
    if not agrees(model, *_meant(config, metadata)):
        said = {key: value for key, value in metadata.values.items() if key.startswith(ROTARY)}
        raise InputError(
            f"{metadata.path} has a rotary embedding that transformers' {type(model).__name__} cannot be given "
            f"({', '.join([*(f'{key} {value}' for key, value in said.items()), *metadata.tables])}): "
            "start from its safetensors"
        )


def agrees(model: nn.Module, full: Rotary, sliding: Rotary) -> bool:
    """Whether all rotary embeddings of the model have the meant frequencies and scale, or none is meant and none there.

    Where a model counts more pairs than turn, theirs are zero.
    """
    plain = full.parameters["rope_type"] == "default"
    found = [
        (
            buffer,
            sliding if "sliding" in name else full,
            getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0),
        )
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]
    return all(_same(*entry) for entry in found) if found else plain


def _same(buffer: Tensor, meant: Rotary, scale: float) -> bool:
    missing = buffer.numel() - meant.frequencies.numel()
    if missing < 0 or not math.isclose(scale, meant.scale, rel_tol=CLOSE):
        return False
    wanted = torch.cat([meant.frequencies, torch.zeros(missing)])
    return torch.allclose(buffer.float().flatten(), wanted, rtol=CLOSE, atol=1e-12)


def _meant(config: Any, metadata: Metadata) -> tuple[Rotary, Rotary]:
    """The rotary embeddings of full and of sliding layers."""
    base = metadata.get("rope.freq_base", BASE)
    full = _scaled(config, metadata, float(base))
    if not rotates_by_kind(config):
        other = metadata.get("rope.freq_base_swa", base)
        if other != base:
            raise metadata.refuse("rope.freq_base_swa", f"and rope.freq_base = {base}: there is a place for one only")
        return full, full
    width = head_width(config)
    count = int(metadata.get("rope.dimension_count_swa") or metadata.get("rope.dimension_count") or width)
    count = min(count, width)
    theta = float(metadata.get("rope.freq_base_swa", BASE))
    return full, Rotary({"rope_type": "default", "rope_theta": theta}, frequencies(theta, count), 1.0)


def _scaled(config: Any, metadata: Metadata, theta: float) -> Rotary:
    width = head_width(config)
    count = int(metadata.get("rope.dimension_count") or width)
    plain = frequencies(theta, count) if count else torch.zeros(0)
    shared: dict[str, Any] = {"rope_theta": theta}
    if count != width or "partial_rotary_factor" in (getattr(config, "rope_parameters", None) or {}):
        shared["partial_rotary_factor"] = count / width
    kind, factor = metadata.get("rope.scaling.type", "linear"), _factor(metadata)
    scale = float(metadata.get("rope.scaling.attn_factor", 1.0))
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise metadata.refuse("rope.scaling.type", "which is not known here")
    if metadata.tables:
        return _tabled(metadata, plain, shared, factor, scale)
    if kind == "yarn":
        return _yarn(config, metadata, plain, shared, factor, scale)
    if scale != 1.0:
        ones = [factor] * len(plain)
        return Rotary(shared | _long(metadata, ones, ones, scale), plain / factor, scale)
    if factor == 1.0:
        return Rotary({"rope_type": "default", **shared}, plain, 1.0)
    return Rotary({"rope_type": "linear", "factor": factor, **shared}, plain / factor, 1.0)


def _factor(metadata: Metadata) -> float:
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0)))
    return 1.0 if metadata.get("rope.scaling.type") == "none" or factor == 0.0 else factor


def frequencies(theta: float, count: int) -> Tensor:
    """theta^(-2i/count) for i < count/2."""
    return 1.0 / theta ** (torch.arange(0, count, 2, dtype=torch.float64) / count).float()


def _tabled(metadata: Metadata, plain: Tensor, shared: dict[str, Any], factor: float, scale: float) -> Rotary:
    """Frequencies divided by a table: Llama 3's where it is that, else LongRoPE's, which is any."""
    tables = {name: table.float().flatten() * factor for name, table in metadata.tables.items()}
    if any(len(table) != len(plain) or not bool((table > 0).all()) for table in tables.values()):
        raise InputError(
            f"{metadata.path} has a table of rotary factors ({', '.join(tables)}) that does not fit its heads: "
            "download it again"
        )
    if TABLE not in tables:
        if LONG not in tables or SHORT not in tables:
            raise InputError(f"{metadata.path} has {next(iter(tables))} without its counterpart: download it again")
        parameters = _long(metadata, tables[SHORT].tolist(), tables[LONG].tolist(), scale)
        return Rotary(shared | parameters, plain / tables[SHORT], scale)
    table = tables[TABLE]
    meant = LLAMA3 | {"factor": float(table.max())}
    if scale == 1.0 and torch.allclose(llama3_table(plain, **meant), table, rtol=CLOSE):
        return Rotary(shared | {"rope_type": "llama3", **meant}, plain / table, 1.0)
    return Rotary(shared | _long(metadata, table.tolist(), table.tolist(), scale), plain / table, scale)


def llama3_table(
    plain: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """By what Llama 3.1 divides plain frequencies: 1 for short waves, `factor` for long ones, between them a mean.

    Source: llama.cpp, conversion/llama.py: generate_extra_tensors.
    """
    turns = original_max_position_embeddings * plain / (2 * math.pi)
    smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _long(metadata: Metadata, short: list[float], long: list[float], scale: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": scale,
        "original_max_position_embeddings": _original(metadata),
    }


def _original(metadata: Metadata) -> int:
    return int(metadata.get("rope.scaling.original_context_length") or metadata.get("context_length", 0))


def _yarn(
    config: Any, metadata: Metadata, plain: Tensor, shared: dict[str, Any], factor: float, scale: float
) -> Rotary:
    if metadata.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise metadata.refuse("rope.scaling.yarn_ext_factor", "and YaRN is known here with 1 only")
    before = config.rope_parameters if isinstance(getattr(config, "rope_parameters", None), dict) else {}
    parameters: dict[str, Any] = {"rope_type": "yarn", "factor": factor, **shared}
    parameters["original_max_position_embeddings"] = _original(metadata)
    parameters["beta_fast"] = float(metadata.get("rope.scaling.yarn_beta_fast", 32.0))
    parameters["beta_slow"] = float(metadata.get("rope.scaling.yarn_beta_slow", 1.0))
    if before.get("rope_type") == "yarn" and "truncate" in before:
        parameters["truncate"] = before["truncate"]
    multiplier = float(metadata.get("rope.scaling.yarn_log_multiplier", 0.0))
    mscale = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    if multiplier:
        mscale /= 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    parameters["attention_factor"] = float(metadata.get("rope.scaling.yarn_attn_factor", mscale)) * scale
    low, high = (
        len(plain) * math.log(parameters["original_max_position_embeddings"] / (beta * 2 * math.pi))
        / math.log(shared["rope_theta"]) for beta in (parameters["beta_fast"], parameters["beta_slow"])
    )  # fmt: skip
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(plain) - 1)
    ramp = ((torch.arange(len(plain)) - low) / max(high - low, 0.001)).clamp(0, 1)
    return Rotary(parameters, plain * (1 - ramp) + plain / factor * ramp, parameters["attention_factor"])
