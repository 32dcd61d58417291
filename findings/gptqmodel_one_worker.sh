#!/usr/bin/env bash
# GPTQModel loads no model with one CPU worker, which is what it takes by itself on one or two processors.
#
# Version: gptqmodel 7.7.0 (with the torch it asks for, several GB). GPTQMODEL_CPU_WORKERS=1 is its own setting for that
# number; without it a machine of two processors gets the same. Its loader asks for two workers of this one.
# Output seen:
#   1 worker: ValueError: Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1
#   2 workers: loaded
# Exit code 0 while that is so, 1 as soon as it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q gptqmodel==7.7.0
cat > "$work/load.py" <<'PY'
import os
import sys

from gptqmodel import GPTQModel, QuantizeConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder, workers = sys.argv[1], os.environ["GPTQMODEL_CPU_WORKERS"]
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
letters = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
letters.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>", eos_token="a").save_pretrained(folder)
try:
    GPTQModel.load(folder, QuantizeConfig(bits=4, group_size=32), device="cpu")
    said = "loaded"
except ValueError as error:
    said = f"ValueError: {error}"
print(f"{workers} worker{'s' * (workers != '1')}: {said}", flush=True)
os._exit(0)
PY
for workers in 1 2; do
  GPTQMODEL_CPU_WORKERS=$workers "$work/venv/bin/python" "$work/load.py" "$work/model" 2>/dev/null | grep worker
done | tee "$work/out"
test "$(cat "$work/out")" = "1 worker: ValueError: Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1
2 workers: loaded"
