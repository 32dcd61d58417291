#!/usr/bin/env bash
# transformers reads a GGUF file without its rotary scaling: the model that comes out is another one, and nothing says so.
#
# Versions: transformers 5.24.0, gguf 0.19.0. A Llama file whose metadata says llama.rope.scaling.type = linear with
# factor 4 gives a config with rope_type default and no factor. llama.cpp multiplies positions by 1/4 for the same file.
# Output seen:
#   file: linear 4.0
#   config: default None
# Exit code 0 while that is so, 1 as soon as it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.24.0 gguf==0.19.0
cd "$work"
"$work/venv/bin/python" - <<'PY' 2>/dev/null | tee "$work/out"
import gguf
import numpy as np
from gguf import GGUFReader, GGUFWriter
from transformers import AutoConfig

writer = GGUFWriter("model.gguf", "llama")
writer.add_context_length(256)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(64)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(8)
writer.add_vocab_size(16)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(4.0)
writer.add_tensor("token_embd.weight", np.zeros((16, 32), dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
fields = GGUFReader("model.gguf").fields
print("file:", fields["llama.rope.scaling.type"].contents(), fields["llama.rope.scaling.factor"].contents())
config = AutoConfig.from_pretrained(".", gguf_file="model.gguf")
print("config:", config.rope_parameters["rope_type"], config.rope_parameters.get("factor"))
PY
test "$(cat "$work/out")" = $'file: linear 4.0\nconfig: default None'
