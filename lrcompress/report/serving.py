"""How a checkpoint is served: the commands that its model card ends with (run by tests/serve and tests/export)."""

from typing import Any

LLAMA_CPP = """params = xllamacpp.CommonParams()
params.model.path = "model.gguf"
{lora}answer = xllamacpp.Server(params).handle_completions({{"prompt": "Once upon a time", "max_tokens": 32}})"""

LORA = 'params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("model-lora.gguf", 1.0)]\n'


def serving(report: dict[str, Any]) -> str:
    """A section of Markdown; what cannot serve the checkpoint is said with the reason."""
    targets = report["targets"]
    experts = any(".experts." in target["name"] and target["format"] != "dense" for target in targets)
    tables = any(target["format"] == "table" for target in targets)
    corrected = any(target["format"] == "sum" for target in targets)
    lora = LORA if corrected else ""
    flag = " --lora model-lora.gguf" if corrected else ""
    if experts or tables:
        what = "experts" if experts else "embeddings"
        cure = "`lrcompress export path/of/this/folder --to dense` writes what it serves"
        vllm = f"vLLM has no place for compressed {what}: {cure}.\n"
    else:
        vllm = """With vLLM, beside which lrcompress needs only to be installed:

```
python -m vllm.entrypoints.openai.api_server --model path/of/this/folder
```
"""
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
