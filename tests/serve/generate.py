"""Greedy tokens of vLLM for prompts that are tokens: generate.py PROCESSES FOLDER... prints JSON lines.

Prompts and transformers' tokens lie in FOLDER.json beside every FOLDER. vLLM loads what it needs by its entry points
alone: nothing of ours is imported here. A folder that does not load is the last one, with what was said.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}  # fmt: skip


def generated(folder: Path, processes: int) -> dict[str, Any]:
    """How many tokens are transformers'."""
    from vllm import LLM, SamplingParams

    wanted = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    model = LLM(
        str(folder), dtype="float32", enforce_eager=True, tensor_parallel_size=processes, max_model_len=128,
        disable_log_stats=True,
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=len(wanted["tokens"][0]), ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in wanted["ids"]]
    found = [list(out.outputs[0].token_ids) for out in model.generate(prompts, settings, use_tqdm=False)]
    pairs = [
        pair for ours, theirs in zip(found, wanted["tokens"], strict=True) for pair in zip(ours, theirs, strict=True)
    ]
    return {"same": sum(a == b for a, b in pairs), "of": len(pairs)}


def main() -> None:
    os.environ.update(SETTINGS)
    for name in sys.argv[2:]:
        try:
            line = generated(Path(name), int(sys.argv[1]))
        except Exception as error:
            print("RESULT " + json.dumps({"folder": name, "error": str(error)}), flush=True)
            raise
        print("RESULT " + json.dumps({"folder": name, **line}), flush=True)


if __name__ == "__main__":
    main()
