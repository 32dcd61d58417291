"""How a checkpoint is served: the commands that its model card ends with (run by tests/serve and tests/export)."""

from lrcompress.checkpoint.manifest import Manifest
from lrcompress.formats.sum import Sum
from lrcompress.vllm_plugin.tensors import without_place

BLOCK = 32
"""Rows of other widths are in no block type of llama.cpp."""

LLAMA_CPP = """params = xllamacpp.CommonParams()
params.model.path = "model.gguf"
{lora}answer = xllamacpp.Server(params).handle_completions({{"prompt": "Once upon a time", "max_tokens": 32}})"""

LORA = 'params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("model-lora.gguf", 1.0)]\n'


def serving(manifest: Manifest) -> str:
    """A section of Markdown; what cannot serve the checkpoint is said with the reason."""
    # Of sums in other widths, and of experts, the converter has base and correction in one.
    held = tuple(f"{name}." for name in manifest.experts)
    corrected = any(
        spec.format == Sum.name and spec.shape[1] % BLOCK == 0 and not (held and name.startswith(held))
        for name, spec in manifest.modules.items()
    )
    lora = LORA if corrected else ""
    flag = " --lora model-lora.gguf" if corrected else ""
    found = without_place(manifest.modules, manifest.experts)
    if found is not None:
        cure = "`lrcompress export path/of/this/folder --to dense` writes what it serves"
        vllm = f"vLLM has no place for {found[1]}: {cure}.\n"
    else:
        experts = "Experts are multiplied out where they are loaded.\n" if manifest.experts else ""
        vllm = f"""With vLLM, beside which lrcompress needs only to be installed:

```
python -m vllm.entrypoints.openai.api_server --model path/of/this/folder
```
{experts}"""
    return f"""## Serve

{vllm}
With llama.cpp (`llama-server -m model.gguf{flag}`, or in Python with `pip install xllamacpp`):

```
lrcompress export path/of/this/folder --to gguf -o model.gguf
```

```python
import xllamacpp

{LLAMA_CPP.format(lora=lora)}
```
"""
