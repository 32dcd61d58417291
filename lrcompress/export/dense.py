"""A compressed checkpoint, or a GGUF file, as an ordinary dense checkpoint, which needs no lrcompress to load."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.budget import parse_size
from lrcompress.checkpoint.folder import read_sound_config
from lrcompress.checkpoint.saved_as import SavedAs
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside
from lrcompress.errors import InputError
from lrcompress.export.source import Source, exported_report, open_compressed, open_file
from lrcompress.finite import all_finite
from lrcompress.foreign.opening import is_gguf
from lrcompress.model.device import resolve_dtype
from lrcompress.model.experts import LinearExperts, experts_of, linear_experts, linearise
from lrcompress.model.skeleton import empty_model
from lrcompress.model.surgery import dense_parts
from lrcompress.protocols import Spec
from lrcompress.report.progress import Reporter
from lrcompress.stages.workspace import new_folder, write_json


def export_dense(
    checkpoint: str,
    output: Path,
    *,
    dtype: str = "auto",
    shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write `output` with every stored format multiplied out in float32, one weight in memory at a time.

    Tensors of the dense rest are kept bit for bit, in `dtype` where it is not `auto`. A GGUF file becomes a folder of
    bfloat16, as compress writes it, unless another `dtype` is asked for.
    """
    reporter, limit, file = reporter or Reporter(quiet=True), parse_size(shard_size), is_gguf(checkpoint)
    wanted = None if dtype == "auto" and not file else resolve_dtype(dtype, torch.bfloat16)
    source = open_file(checkpoint) if file else open_compressed(checkpoint)
    model = model_with_experts(source, trust_remote_code=trust_remote_code)
    switches, zeros = bias_switches(source, trust_remote_code=trust_remote_code)
    with new_folder([source.folder], output, overwrite=overwrite) as folder:
        copy_files_beside(source.folder, folder, code=True)
        config = dense_config(source, wanted, switches, trust_remote_code=trust_remote_code)
        write_json(folder / "config.json", config)
        write_weights(Layers(source), model, folder, limit, wanted, zeros, reporter)
        report = exported_report(source, folder, {}, trust_remote_code=trust_remote_code)
        if report is not None:
            write_json(folder / "report.json", report)
        (folder / "README.md").write_text(card(source), encoding="utf8")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "schema": 1,
        "checkpoint": checkpoint,
        "to": "dense",
        "output": str(output),
        "layers": len(source.manifest.modules),
        "dtype": str(wanted or source.reader.dtype).removeprefix("torch."),
        "switches": switches,
        "bytes": {"checkpoint": size},
    }


def dense_config(
    source: Source, dtype: torch.dtype | None, switches: list[str], *, trust_remote_code: bool
) -> dict[str, Any]:
    """config.json without the manifest, with the name of the model's class, by which other tools go."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if not config.get("architectures"):
        read = read_sound_config(source.folder, trust_remote_code=trust_remote_code)
        config["architectures"] = [type(empty_model(read, trust_remote_code=trust_remote_code)).__name__]
    return {**config, **dict.fromkeys(switches, True)}


def model_with_experts(source: Source, *, trust_remote_code: bool) -> nn.Module:
    """The model, empty, with the experts that are stored as linear layers."""
    config = read_sound_config(source.folder, trust_remote_code=trust_remote_code)
    model = empty_model(config, trust_remote_code=trust_remote_code)
    linearise(model, source.manifest.experts)
    return model


class Layers:
    """What stands in the place of a compressed layer: here the dense one."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def planned(self, name: str, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        """Names and meta tensors of what `tensors` gives."""
        spec = self.source.manifest.modules[name]
        return [(key, torch.empty(shape, dtype=dtype, device="meta")) for key, shape in dense_shapes(name, spec)]

    def tensors(self, name: str, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        """What is written for layer `name`, numbers of the dense rest in `dtype`."""
        return dense_tensors(self.source, name, dtype)


def write_weights(
    layers: Layers,
    model: nn.Module,
    folder: Path,
    limit: int,
    dtype: torch.dtype | None,
    zeros: dict[str, Tensor],
    reporter: Reporter,
) -> None:
    """Every tensor in the order of its name in `model`, under the names that transformers gives it in a file; `zeros`
    are meta tensors of biases that a switch asks for, added last."""
    source = layers.source
    reader = source.reader
    experts = linear_experts(model)
    fused = {f"{name}.{key}": (name, key) for name, module in experts.items() for key in module.fused_shapes()}

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def written(name: str) -> torch.dtype:
        """The dtype of weight or bias `name`, by its tensor or the empty one in its place."""
        return cast(reader.meta(name)).dtype

    names = [name for name in reader.names() if source.owner(name) in (None, name.removesuffix(".weight"))]
    names = [*(name for name in names if experts_of(name, experts) is None), *fused]
    planned: list[tuple[str, Tensor]] = []
    for name in names:
        module = source.owner(name)
        if name in fused:
            holder, key = fused[name]
            kind = written(f"{holder}.0.up_proj.weight")
            planned.append((name, torch.empty(experts[holder].fused_shapes()[key], dtype=kind, device="meta")))
        elif module is None:
            planned.append((name, cast(reader.meta(name))))
        else:
            planned += layers.planned(module, written(name))
    planned += [(name, cast(meta)) for name, meta in zeros.items()]
    metas, saved = dict(planned), SavedAs(model, planned)

    def tensors(name: str) -> list[tuple[str, Tensor]]:
        module = source.owner(name)
        if name in fused:
            holder, key = fused[name]
            return [(name, fused_tensor(layers, holder, experts[holder], key, metas[name].dtype))]
        return [(name, cast(reader.tensor(name)))] if module is None else layers.tensors(module, written(name))

    writer = ShardedWriter(folder, [part for name, _ in planned for part in saved.planned[name]], limit)
    with reporter.phase("write", len(names)) as tick:
        for name in names:
            for key, tensor in tensors(name):
                writer.write(saved(key, tensor))
            tick()
    for name in zeros:
        writer.write(saved(name, torch.zeros(metas[name].shape, dtype=metas[name].dtype)))
    writer.close()


def fused_tensor(layers: Layers, name: str, experts: LinearExperts, parameter: str, dtype: torch.dtype) -> Tensor:
    """Fused `parameter` of module `name`, one expert's weights multiplied out at a time."""
    source, found = layers.source, torch.empty(experts.fused_shapes()[parameter], dtype=dtype)
    for index in range(experts.count):
        parts = {}
        for key in experts.tensors_of(parameter):
            full = f"{name}.{index}.{key}"
            layer = full.rpartition(".")[0]
            compressed = layer in source.manifest.modules
            parts[key] = (
                dict(layers.tensors(layer, dtype))[full] if compressed else source.reader.tensor(full).to(dtype)
            )
        found[index] = experts.join(parameter, parts)
    return found


def dense_shapes(name: str, spec: Spec) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the dense layer's tensors, a Conv1D's weight transposed."""
    weight = (f"{name}.weight", tuple(reversed(spec.shape)) if spec.conv1d else spec.shape)
    return [weight, (f"{name}.bias", spec.shape[:1])] if spec.bias else [weight]


def dense_tensors(source: Source, name: str, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """The dense layer's tensors in `dtype`."""
    spec = source.manifest.modules[name]
    weight, bias = dense_parts(source.layer(name))
    found = [weight.T if spec.conv1d else weight] + ([] if bias is None else [bias])
    tensors = [tensor.to(dtype) for tensor in found]
    if not all(all_finite(tensor) for tensor in tensors):
        raise InputError(f"{name} does not fit into {dtype} once multiplied out: pass --dtype bfloat16 or float32")
    return [(key, tensor) for (key, _), tensor in zip(dense_shapes(name, spec), tensors, strict=True)]


def bias_switches(source: Source, *, trust_remote_code: bool) -> tuple[list[str], dict[str, Tensor]]:
    """Switches of the config that give every added bias a slot, and the slots left over, to be filled with zeros.

    Found by trying: a switch is an entry that is false and speaks of a bias, and turning it on adds biases and nothing
    else. InputError where an added bias stays without a slot.
    """
    wanted = {f"{name}.bias": spec.shape[:1] for name, spec in source.manifest.modules.items() if spec.added_bias}
    if not wanted:
        return [], {}
    config = read_sound_config(source.folder, trust_remote_code=trust_remote_code)
    plain = _shapes(config, [], trust_remote_code)
    switches = []
    for key, value in config.to_dict().items():  # type: ignore[attr-defined]
        if value is False and "bias" in key:
            tried = _shapes(config, [key], trust_remote_code)
            new = tried.keys() - plain.keys()
            if plain.items() <= tried.items() and new & wanted.keys() and all(name.endswith(".bias") for name in new):
                switches.append(key)
    gained = dict(_shapes(config, switches, trust_remote_code).items() - plain.items())
    lost = sorted(name for name, shape in wanted.items() if gained.get(name) != shape)
    if lost:
        raise InputError(
            f"{len(lost)} of the biases that metric=centred added to {source.label} have no place in a dense "
            f"{source.config.get('model_type')} ({lost[0]}): compress with --set metric=input, which adds none"
        )
    dtype = source.reader.dtype
    left = [(name, shape) for name, shape in sorted(gained.items()) if name not in wanted]
    return switches, {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in left}


def _shapes(config: object, switches: list[str], trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Name to shape of the dense model's tensors with these switches on."""
    changed = copy.deepcopy(config)
    for key in switches:
        setattr(changed, key, True)
    model = empty_model(changed, trust_remote_code=trust_remote_code)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def card(source: Source) -> str:
    """README.md of the dense checkpoint."""
    auto = (source.report or {}).get("loads_with", "AutoModelForCausalLM")
    made = (
        f"Compressed by lrcompress ({source.manifest.method}) and multiplied out again: it computes what the "
        "compressed model\ncomputes, up to rounding, is as large as the model before compression, and loads without "
        "lrcompress."
        if source.manifest.modules
        else "Converted from GGUF by lrcompress: every tensor dequantised. It loads without lrcompress."
    )
    return f"""---
library_name: transformers
---
# {source.label} as a dense checkpoint

{made}

```python
from transformers import {auto}

model = {auto}.from_pretrained("path/of/this/folder")
```
"""
