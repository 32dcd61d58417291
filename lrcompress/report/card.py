"""The model card of a finished checkpoint."""

from pathlib import Path
from typing import Any

from lrcompress.budget import FEW_TARGETS
from lrcompress.checkpoint.manifest import Manifest, read_manifest
from lrcompress.checkpoint.writer import disk_errors
from lrcompress.recipe import Recipe, dump_recipe
from lrcompress.report.held_out import windows_in_words
from lrcompress.report.measured import metric_rows
from lrcompress.report.serving import serving
from lrcompress.report.summary import answer, bits_stored, dense_parts_in_words, targets_share


def write_card(folder: Path, report: dict[str, Any], recipe: Recipe) -> None:
    """README.md of the checkpoint: how to load it, what was done, what was measured."""
    with disk_errors(folder):
        manifest = read_manifest(folder) or Manifest(report["method"], {})
        (folder / "README.md").write_text(card(report, recipe, manifest), encoding="utf8")
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf8")


def card(report: dict[str, Any], recipe: Recipe, manifest: Manifest) -> str:
    """The model card's text."""
    ratio, size = report["ratio"], report["bytes"]
    base = "HuggingFaceTB/SmolLM2-135M-Instruct" if report["model"] == "demo" else report["model"]
    auto = report.get("loads_with", "AutoModelForCausalLM")
    hub = f"base_model: {base}\n" if base.count("/") == 1 and not base.startswith((".", "/")) else ""
    measured = _measured(report.get("evaluation"))
    said = answer(report, recipe.model_dump(mode="json"))
    asked = f"| how much | {said} |\n" if said else ""
    share = targets_share(report)
    few = f"| compressed weights, of the dense checkpoint's bytes | {share:.2%} |\n" if share < FEW_TARGETS else ""
    if dense := dense_parts_in_words(report.get("left_dense", [])):
        few += f"| left dense beside the blocks | {dense} |\n"
    calibration, held_out = report["calibration"], report.get("held_out")
    few += _held_out_rows(held_out) if held_out is not None else ""
    warnings = "".join(f"**Warning**: {text}\n\n" for text in report["warnings"])
    trained = "".join(f"| {key} | {said} |\n" for key in ("refined", "healed") if (said := training(report.get(key))))
    text = (
        "none (weights only)"
        if calibration is None
        else (
            f"{calibration['tokens']} tokens of {', '.join(calibration['sources'])}"
            + ("" if calibration["general"] else " (not general text)")
        )
    )
    return f"""---
library_name: transformers
{hub}tags: [lrcompress, low-rank, compressed]
---
# {report["model"]} compressed by {report["method"]}

```python
import lrcompress  # registers the stored formats with transformers
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

Where lrcompress is not installed, the load stops with a size mismatch. `model.dequantize()` gives the ordinary dense
model.

| | |
|---|---|
| removed of the compressed weights' bytes | {ratio["stored"]:.2%} |
| removed of the whole checkpoint's bytes | {ratio["whole_model"]:.2%} |
| bits stored for each of these weights | {bits_stored(report):.3f} |
| checkpoint | {size["checkpoint"] / 1e6:.1f} MB |
{few}{asked}| calibration | {text} |
{trained}| lrcompress | {report["versions"]["lrcompress"]} |

{warnings}{measured}## Recipe

```yaml
{dump_recipe(recipe)}```

{serving(manifest)}"""


def _held_out_rows(held_out: dict[str, Any]) -> str:
    """Lines of a table, one a length of context; the standard error is that of the first."""
    rows = ""
    for place, context in enumerate(held_out["contexts"]):
        times, error = context["perplexity"] / context["before"], held_out.get("ratio_stderr")
        shown = f"{times:.3f}" if error is None or place else f"{times:.3f} ± {error:.3f}"
        what = f"perplexity on held-out calibration text, {context['tokens']} tokens of context"
        rows += f"| {what} | {shown} times, {windows_in_words(held_out)} |\n"
    return rows


def training(found: dict[str, Any] | None) -> str | None:
    """What a training of the stored numbers did, in words."""
    if found is None:
        return None
    loss, how = found["held_out"], found["train"]
    teacher = {"none": "", "logits": " against the dense model's logits"}.get(
        found["distill"], " against the dense model's logits and hidden states"
    )
    after = f"to {loss['after']:.4f}" if found["kept"] else "and no better: the weights are unchanged"
    return (
        f"{how} trained for {found['minutes']:.1f} minutes, {found['steps']} steps{teacher}; "
        f"held-out loss from {loss['before']:.4f} {after}"
    )


def _measured(evaluation: dict[str, Any] | None) -> str:
    return "\n".join(["## Measured", "", *metric_rows(evaluation), "", ""]) if evaluation else ""
