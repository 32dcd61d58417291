#!/usr/bin/env bash
# transformers cannot build the model of DbrxConfig's own documented example: an attention layer asks its sub-config for
# rope_theta, which moved to rope_parameters of the model's config and is set nowhere.
#
# Versions: transformers 5.24.0, torch 2.13.0. A config.json whose attn_config still names rope_theta, as published
# checkpoints do, builds; one that was made in Python from the documented arguments does not.
# Output seen:
#   documented: AttributeError rope_theta
#   with rope_theta: built
# Exit code 0 while that is so, 1 as soon as it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q transformers==5.24.0
cd "$work"
"$work/venv/bin/python" - <<'PY' 2>/dev/null | tee "$work/out"
import torch
from transformers import DbrxConfig, DbrxModel

sizes = {"n_layers": 2, "d_model": 256, "n_heads": 8, "vocab_size": 128}
for name, more in (("documented", {}), ("with rope_theta", {"attn_config": {"rope_theta": 10000.0}})):
    try:
        with torch.device("meta"):
            DbrxModel(DbrxConfig(**sizes, **more))
        print(f"{name}: built")
    except AttributeError as error:
        print(f"{name}: AttributeError {error.name}")
PY
test "$(cat "$work/out")" = $'documented: AttributeError rope_theta\nwith rope_theta: built'
