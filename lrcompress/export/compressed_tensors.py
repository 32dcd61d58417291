"""As a compressed-tensors checkpoint, which vLLM and transformers read, with the corrections as a LoRA adapter."""

from pathlib import Path
from typing import Any

from torch import nn

from lrcompress.budget import parse_size
from lrcompress.checkpoint.folder import read_sound_config
from lrcompress.checkpoint.writer import copy_files_beside
from lrcompress.errors import InputError
from lrcompress.evaluation.loading import LoadedModel, load_model
from lrcompress.export.dense import bias_switches, dense_config, model_with_experts, write_weights
from lrcompress.export.packed import PackedLayers, Scheme
from lrcompress.export.peft import write_adapter_folder
from lrcompress.export.rounding import perplexity_rise, read_together
from lrcompress.export.source import Source, open_compressed
from lrcompress.foreign.one_rank import adapter_dtype
from lrcompress.formats.sum import Sum
from lrcompress.model.skeleton import empty_model
from lrcompress.report.progress import Reporter
from lrcompress.stages.workspace import new_folder, write_json

ADAPTER = "adapter"

MOST_LOSS = 0.005
"""Rise of the perplexity that rounding to 8 bits may cost."""

ZEROS = (
    "weights with zero points: vLLM reads them, transformers needs "
    "quantization_config=CompressedTensorsConfig(dequantize=True)"
)


def export_compressed_tensors(
    checkpoint: str,
    output: Path,
    *,
    dtype: str = "auto",
    shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write `output` with integer weights packed in 4 or 8 bits, and `output`/adapter where there are corrections.

    Quantized weights keep their numbers; coded ones, and those of 8 bits that need zero points, are rounded to 8 bits
    by row, and the loss is measured. `dtype` is the adapter's. InputError where nothing is an integer, where a layer
    has no such form, and where layers that servers run as one differ.
    """
    reporter, limit = reporter or Reporter(quiet=True), parse_size(shard_size)
    wanted = adapter_dtype(dtype)
    source = open_compressed(checkpoint)
    _check(source)
    layers = PackedLayers(source)
    if not layers.schemes:
        raise InputError(
            f"{checkpoint} holds no integers, none of its {len(source.manifest.modules)} weights is quantized or coded:"
            " use --to dense, or serve it as it is with vLLM"
        )
    loaded = load_model(checkpoint, trust_remote_code=trust_remote_code)
    check_together(read_together(loaded.model), layers)
    loss = _checked_loss(checkpoint, loaded, layers, trust_remote_code=trust_remote_code)
    del loaded
    switches, zeros = bias_switches(source, trust_remote_code=trust_remote_code)
    corrected = {name: spec for name, spec in source.manifest.modules.items() if spec.format == Sum.name}
    with new_folder([source.folder], output, overwrite=overwrite) as folder:
        copy_files_beside(source.folder, folder, code=True)
        config = dense_config(source, None, switches, trust_remote_code=trust_remote_code)
        linear = _linear_layers(source, trust_remote_code=trust_remote_code)
        write_json(folder / "config.json", {**config, "quantization_config": settings(layers.schemes, linear)})
        model = model_with_experts(source, trust_remote_code=trust_remote_code)
        write_weights(layers, model, folder, limit, None, zeros, reporter)
        sizes = {"checkpoint": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}
        found: dict[str, Any] = {}
        if corrected:
            (folder / ADAPTER).mkdir()
            place = str(output.resolve())
            found = write_adapter_folder(source, corrected, folder / ADAPTER, place, wanted, reporter)
            sizes["adapter"] = sum(p.stat().st_size for p in (folder / ADAPTER).glob("*.safetensors"))
        (folder / "README.md").write_text(card(source, layers, loss, found.get("ranks")), encoding="utf8")
    return {
        "schema": 1,
        "checkpoint": checkpoint,
        "to": "compressed-tensors",
        "output": str(output),
        "layers": len(layers.schemes),
        "schemes": sorted({scheme.text for scheme in layers.schemes.values()}),
        "rounded": len(layers.rounded),
        "loss": loss,
        "notes": notes(layers, loss),
        **found,
        "bytes": sizes,
    }


def _checked_loss(
    checkpoint: str, loaded: LoadedModel, layers: PackedLayers, *, trust_remote_code: bool
) -> float | None:
    """What rounding costs, None where nothing is rounded; InputError where it is too much."""
    if not layers.rounded:
        return None
    loss = perplexity_rise(loaded, layers.rounded, layers.weight, trust_remote_code=trust_remote_code)
    if loss >= MOST_LOSS:
        raise InputError(
            f"{checkpoint} in 8 bits with one scale a row has a perplexity {loss:.2%} higher, {MOST_LOSS:.1%} is"
            " the most: use --to gguf, whose blocks are finer, or serve it as it is with vLLM"
        )
    return loss


def _check(source: Source) -> None:
    if source.manifest.experts:
        raise InputError(
            f"{source.label} is a mixture of experts, whose layers transformers fuses and compressed-tensors does not: "
            "use --to gguf or dense"
        )
    turned = next((name for name, spec in source.manifest.modules.items() if spec.conv1d), None)
    if turned is not None:
        raise InputError(f"{turned} is a transposed layer (Conv1D), which compressed-tensors does not pack: --to dense")


def check_together(groups: list[list[str]], layers: PackedLayers) -> None:
    """InputError where layers that servers run as one are packed in different ways."""
    for names in groups:
        schemes = {name: layers.schemes.get(name) for name in names}
        if len(set(schemes.values())) > 1:
            shown = ", ".join(
                f"{name.rpartition('.')[2]} {scheme.text if scheme else 'dense'}" for name, scheme in schemes.items()
            )
            raise InputError(
                f"{names[0].rpartition('.')[0]} has {shown}: vLLM runs them as one layer and wants them alike; use "
                "--to gguf, or serve the checkpoint as it is with vLLM"
            )


def _linear_layers(source: Source, *, trust_remote_code: bool) -> list[str]:
    config = read_sound_config(source.folder, trust_remote_code=trust_remote_code)
    model = empty_model(config, trust_remote_code=trust_remote_code)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def settings(schemes: dict[str, Scheme], linear: list[str]) -> dict[str, Any]:
    """quantization_config; one scheme is for all linear layers but those that are left out, several name theirs."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    named = [["Linear"]] if len(groups) == 1 else list(groups.values())
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name in linear if name not in schemes],
        "config_groups": {
            f"group_{i}": scheme.as_json(targets) for i, (scheme, targets) in enumerate(zip(groups, named, strict=True))
        },
    }


def notes(layers: PackedLayers, loss: float | None) -> list[str]:
    """What a user has to know, a sentence each."""
    found = []
    if loss is not None:
        found.append(f"{len(layers.rounded)} weights rounded to 8 bits by row: perplexity {loss:+.3%} on python-docs")
    with_zeros = sum(scheme.zeros for scheme in layers.schemes.values())
    if with_zeros:
        found.append(f"{with_zeros} {ZEROS}")
    return found


def card(source: Source, layers: PackedLayers, loss: float | None, ranks: list[int] | None) -> str:
    """README.md of the folder."""
    said = "".join(f"- {note}\n" for note in notes(layers, loss))
    # Without zero points the library unpacks a layer as it is first run, which PEFT looks into before.
    zeros = ranks is not None or any(scheme.zeros for scheme in layers.schemes.values())
    option = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if zeros else ""
    imported = "AutoModelForCausalLM, CompressedTensorsConfig" if zeros else "AutoModelForCausalLM"
    serve = "python -m vllm.entrypoints.openai.api_server --model path/of/this/folder"
    adapter = peft = ""
    if ranks is not None:
        room = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= ranks[1] or size == 512)
        serve += f" \\\n  --enable-lora --max-lora-rank {room} --lora-modules corrected=path/of/this/folder/{ADAPTER}"
        peft = "from peft import PeftModel\n"
        adapter = f'\nmodel = PeftModel.from_pretrained(model, "path/of/this/folder/{ADAPTER}")'
        said += "- a request for the model `corrected` computes what the checkpoint did; the base alone is worse\n"
    return f"""---
library_name: transformers
tags: [compressed-tensors]
---
# {source.label} as a compressed-tensors checkpoint

Exported by lrcompress; loads without it.

{said}
```python
{peft}from transformers import {imported}

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder"{option}){adapter}
```

```
{serve}
```
"""
