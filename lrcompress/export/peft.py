"""The corrections of a checkpoint as a LoRA adapter, and the base alone as a checkpoint beside it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.budget import parse_size
from lrcompress.checkpoint.manifest import Manifest
from lrcompress.checkpoint.writer import ShardedWriter, copy_files_beside
from lrcompress.errors import InputError
from lrcompress.export.source import Source, exported_report, open_compressed
from lrcompress.foreign.adapter import CONFIG
from lrcompress.foreign.new_adapter import Shape, lora_settings, lora_tensors, new_config, write_adapter
from lrcompress.foreign.one_rank import adapter_dtype, level_config, one_rank, padded
from lrcompress.formats import FORMATS
from lrcompress.formats.base import LeafLinear
from lrcompress.formats.sum import Sum, part
from lrcompress.protocols import Spec
from lrcompress.report.progress import Reporter
from lrcompress.stages.workspace import new_folder, write_json

BASE = "base"


def export_peft(
    checkpoint: str,
    output: Path,
    *,
    dtype: str = "auto",
    per_module_ranks: bool = False,
    shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write `output` as a LoRA adapter with the base in its folder `base`: base + adapter computes the checkpoint.

    The base's tensors are the checkpoint's bit for bit, and it carries the sums' biases, those that a centred metric
    moved by what the correction leaves included: an adapter has none. All corrections are padded to one rank, which
    every reader of adapters takes, but for `per_module_ranks`; `dtype` is the adapter's.
    """
    reporter, limit, wanted = reporter or Reporter(quiet=True), parse_size(shard_size), adapter_dtype(dtype)
    source = open_compressed(checkpoint)
    corrected = {name: spec for name, spec in source.manifest.modules.items() if spec.format == Sum.name}
    if not corrected:
        raise InputError(
            f"{checkpoint} has no correction to export, none of its {len(source.manifest.modules)} compressed weights "
            "is a sum: compress with --method eora and --rank 1 or more, or export --to dense"
        )
    bases = {name: base_spec(spec) for name, spec in source.manifest.modules.items()}
    for name in corrected:
        if not issubclass(FORMATS.get(bases[name].format), LeafLinear):
            raise InputError(
                f"{name} has a base stored as {bases[name].format}, which PEFT cannot adapt: --to dense can"
            )
    with new_folder([source.folder], output, overwrite=overwrite) as folder:
        base = folder / BASE
        base.mkdir()
        write_base(source, bases, base, limit, reporter)
        found = write_adapter_folder(
            source, corrected, folder, str((output / BASE).resolve()), wanted, reporter, per_module=per_module_ranks
        )
        report = exported_report(source, base, bases, trust_remote_code=trust_remote_code)
        if report is not None:
            write_json(base / "report.json", report)
        (base / "README.md").write_text(base_card(source), encoding="utf8")
        (folder / "README.md").write_text(adapter_card(source, corrected), encoding="utf8")
        sizes = {key: sum(p.stat().st_size for p in where.glob("*.safetensors"))
                 for key, where in (("adapter", folder), ("base", base))}  # fmt: skip
    return {
        "schema": 1,
        "checkpoint": checkpoint,
        "to": "peft",
        "output": str(output),
        "layers": len(corrected),
        **found,
        "bytes": sizes,
    }


def base_spec(spec: Spec) -> Spec:
    """A weight without its correction; the bias stays."""
    if spec.format != Sum.name:
        return spec
    return replace(part(spec, "base"), bias=spec.bias, added_bias=spec.added_bias, conv1d=spec.conv1d)


def write_base(source: Source, bases: dict[str, Spec], folder: Path, limit: int, reporter: Reporter) -> None:
    """The checkpoint without its corrections."""
    copy_files_beside(source.folder, folder, code=True)
    manifest = Manifest(source.manifest.method, bases, source.manifest.frozen, source.manifest.experts)
    write_json(folder / "config.json", {**source.config, "quantization_config": manifest.as_json()})
    named = [(base_name(source, stored), stored) for stored in source.reader.names()]
    kept = [(name, stored) for name, stored in named if name is not None]
    writer = ShardedWriter(folder, [(name, source.reader.meta(stored)) for name, stored in kept], limit)
    with reporter.phase("write base", len(kept)) as tick:
        for name, stored in kept:
            writer.write([(name, source.reader.tensor(stored))])
            tick()
    writer.close()


def base_name(source: Source, name: str) -> str | None:
    """What stored tensor `name` is called in the base alone, None where it belongs to the correction."""
    module = source.owner(name)
    if module is None or source.manifest.modules[module].format != Sum.name:
        return name
    key = name.removeprefix(module + ".")
    if key.startswith("base."):
        return f"{module}.{key.removeprefix('base.')}"
    return name if key in ("weight", "bias") else None


def write_adapter_folder(
    source: Source,
    corrected: dict[str, Spec],
    folder: Path,
    base: str,
    dtype: torch.dtype | None,
    reporter: Reporter,
    *,
    per_module: bool = False,
) -> dict[str, Any]:
    """Config and weights of the adapter, a layer in memory at a time; returns its ranks and dtypes.

    base: what the config names as its base.
    """
    own = {name: spec.rank for name, spec in corrected.items()}
    common = one_rank(own.values())
    ranks = own if per_module else dict.fromkeys(own, common)
    dtypes = {name: dtype or factor_dtype(source, name) for name in corrected}
    shapes = {name: Shape(spec.shape, ranks[name], (dtypes[name],) * 2) for name, spec in corrected.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with reporter.phase("write adapter", len(corrected)) as tick:
            for name in corrected:
                left, right = sum_layer(source, name).factors()
                yield from lora_tensors(name, *padded(right.to(dtypes[name]), left.to(dtypes[name]), ranks[name]))
                tick()

    write_adapter(folder, {}, shapes, tensors())
    settings = lora_settings(own) if per_module else level_config({}, common)
    write_json(folder / CONFIG, new_config(settings, base, corrected))
    return {
        "ranks": [min(ranks.values()), max(ranks.values())],
        "dtypes": sorted({str(found).removeprefix("torch.") for found in dtypes.values()}),
    }


def sum_layer(source: Source, name: str) -> Sum:
    """Corrected module `name` with its tensors, in float32."""
    layer = source.layer(name)
    assert isinstance(layer, Sum)
    return layer


def factor_dtype(source: Source, name: str) -> torch.dtype:
    """The stored one where factors are stored as numbers; float32 for codes of 8 or 4 bits.

    A code times its scale has up to 15 significant bits, more than bfloat16 and float16 hold.
    """
    bits = source.manifest.modules[name].parameters["correction"]["bits"]
    return source.reader.meta(f"{name}.A.weight").dtype if bits == 16 else torch.float32


def adapter_card(source: Source, corrected: dict[str, Spec]) -> str:
    """README.md of the adapter."""
    return f"""---
library_name: peft
tags: [lrcompress, lora, eora]
---
# The corrections of {source.label} as a LoRA adapter

{len(corrected)} weights of the compressed model in `base` have a low-rank correction of what their compression gets
wrong. `base` with this adapter computes the checkpoint that was exported; `base` alone is worse.

```python
import lrcompress  # registers the stored formats with transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("path/of/this/folder/base")
model = PeftModel.from_pretrained(base, "path/of/this/folder")
```

To merge, load it over `base.dequantize()`. `base_model_name_or_path` in adapter_config.json is where the export was
written: change it when the folder moves and you load by it.
"""


def base_card(source: Source) -> str:
    """README.md of the base."""
    return f"""---
library_name: transformers
tags: [lrcompress, compressed]
---
# The base of {source.label}, without its corrections

Exported by lrcompress as the base of the LoRA adapter in the folder above. Alone it is worse than the checkpoint it
comes from; nothing that was measured on that holds here. Its biases are those of base and adapter together.

```python
import lrcompress  # registers the stored formats with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
```
"""
