#!/usr/bin/env bash
# torch's FlopCounterMode counts nothing for a product with int8 weights: a model that uses it seems to multiply nothing.
#
# Version: torch 2.13.0. aten._weight_int8pack_mm of (3, 64) rows with (32, 64) codes makes 2 * 3 * 32 * 64 = 12288
# operations, as the same product in float32 does; the counter has 12288 for that and 0 for the integers.
# Output seen:
#   float32 12288
#   int8 0
# Exit code 0 while that is so, 1 as soon as it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY' 2>/dev/null | tee "$work/out"
import torch
from torch.utils.flop_counter import FlopCounterMode

rows, codes, scale = torch.ones(3, 64), torch.ones(32, 64, dtype=torch.int8), torch.ones(32)
for name, product in (
    ("float32", lambda: torch.nn.functional.linear(rows, codes.float())),
    ("int8", lambda: torch._weight_int8pack_mm(rows, codes, scale)),
):
    with FlopCounterMode(display=False) as counter:
        result = product()
    assert torch.equal(result, torch.full((3, 32), 64.0))
    print(name, counter.get_total_flops())
PY
test "$(cat "$work/out")" = $'float32 12288\nint8 0'
