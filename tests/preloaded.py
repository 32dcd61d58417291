"""What the server of tests/commands.py has imported before it forks: the libraries, and ours. Nothing is computed here.

In a process of its own each costs seconds, and `run_cli` starts hundreds.
"""

import gc
import importlib

LIBRARIES = ["torch", "transformers", "transformers.models.llama.modeling_llama", "lm_eval.evaluator", "typer", "rich"]
OURS = [
    "cli.app",
    "cli.show",
    "pipeline",
    "evaluation.compare",
    "sweep",
    "heal",
    "export.dense",
    "export.gguf",
    "export.peft",
]

for name in [*LIBRARIES, *(f"lrcompress.{part}" for part in OURS)]:
    importlib.import_module(name)

from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

get_checkpoint_conversion_mapping("llama")  # of all architectures: some thousand patterns
gc.freeze()  # no collection goes through, and so copies, what all have
