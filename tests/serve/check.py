"""`make serve-check`: our checkpoints in vLLM and llama.cpp beside transformers, in a virtual environment of their own.

check.py WORK [PART...]: tiny models of every kind are made in the folder WORK, and kept there with what was found: a
check that was stopped goes on where it was. A PART of "ARCHITECTURE/FORMAT RUNTIME" chooses, none is all. Ends with one
table, and exit code 1 where something is wrong.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.serve.generate import SETTINGS
from tests.serve.models import EXPERTS, PROMPTS, RECIPES, REFUSED, compress, greedy, make_dense
from tests.serve.results import Item, Results
from tests.serve.server import DidNotStart, corrected, served

MODELS = ("llama", "qwen3", "gemma3", "mixtral")

SPLIT = {
    2: ("pivoted", "joined", "coded", "quantized", "sum_of_codes", "sparse_sum", "sparse_dictionary"),
    3: ("low_rank", "coded", "sum", "semi_sparse"),
}
"""Of the Llama, in so many processes."""

PACKED = ("quantized", "sum")
"""What `export --to compressed-tensors` is for in 4 bits: vLLM's CPU kernel takes no others, such as coded ones in 8."""

TOKENS, TOGETHER = 32, 6

VLLM = "vLLM"
"""And the number of processes where there are several."""


def plan() -> list[Item]:
    """Everything, in the table's order."""
    items = [Item(name, kind, VLLM) for kind in MODELS for name in RECIPES]
    items += [Item(name, "qwen3_moe", VLLM) for name in EXPERTS] + [Item("experts_low_rank", "mixtral", VLLM)]
    items += [Item(name, kind, VLLM) for kind, name in REFUSED]
    items += [Item(name, "llama", f"{VLLM} x{count}") for count, names in SPLIT.items() for name in names]
    items += [Item("experts_low_rank", "qwen3_moe", f"{VLLM} x2")]
    items += [Item(name, "llama", "vLLM server") for name in ("low_rank", "coded")]
    items += [Item(name, "llama", "compressed-tensors in vLLM") for name in PACKED]
    return items + [Item(name, "llama", "llama.cpp") for name in RECIPES]


def made(work: Path, item: Item) -> Path:
    """The checkpoint, with transformers' tokens beside it."""
    from transformers import AutoTokenizer

    folder = work / item.architecture / item.name
    dense = folder.with_name("dense")
    if not dense.is_dir():
        make_dense(item.architecture, dense)
    if not folder.with_name(f"{item.name}.json").is_file():
        if not folder.is_dir():
            compress(dense, folder, item.name)
        tokenizer = AutoTokenizer.from_pretrained(dense)
        ids = [[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]] for prompt in PROMPTS]
        found = {"ids": ids, "tokens": greedy(folder, ids, TOKENS)}
        folder.with_name(f"{item.name}.json").write_text(json.dumps(found))
    return folder


def in_batches(items: list[Item], work: Path) -> Iterator[tuple[Item, bool, str]]:
    """Tokens of vLLM: several checkpoints of a model in one process, or each in several processes."""
    for architecture, runtime in dict.fromkeys((item.architecture, item.runtime) for item in items):
        left = [item for item in items if (item.architecture, item.runtime) == (architecture, runtime)]
        processes = runtime.partition(" x")[2] or "1"
        while left:
            batch = left[: TOGETHER if processes == "1" else 1]
            found = 0
            for answer in answers([processes, *(str(made(work, item)) for item in batch)], work):
                yield batch[found], *judged(batch[found], answer)
                found += 1
            if found == 0:
                yield batch[0], False, f"ended without an answer, see {work}/log.txt"
            left = left[max(found, 1) :]


def answers(arguments: list[str], work: Path) -> Iterator[dict[str, object]]:
    """What generate.py says, as it says it."""
    command = [sys.executable, "-m", "tests.serve.generate", *arguments]
    with (work / "log.txt").open("a") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith(b"RESULT "):
                yield json.loads(line.removeprefix(b"RESULT "))


def judged(item: Item, answer: dict[str, object]) -> tuple[bool, str]:
    """Whether tokens are transformers', or the checkpoint was refused, where it must be, with the way out."""
    if "error" not in answer:
        return answer["same"] == answer["of"], f"{answer['same']} of {answer['of']}"
    refused = (item.architecture, item.name) in REFUSED or item.name == "experts_biased"
    return refused and "lrcompress export" in str(answer["error"]), "refused" if refused else str(answer["error"])


def in_llama_cpp(folder: Path, work: Path) -> tuple[bool, str]:
    """The commands of the model card, and the numbers of what they write."""
    command = [sys.executable, "-m", "tests.serve.llama_cpp", str(folder)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    with (work / "log.txt").open("a") as log:
        log.write(done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return (done.returncode == 0 and bool(lines)), lines[0].removeprefix("RESULT ") if lines else "ended without words"


def main() -> None:
    work, chosen = Path(sys.argv[1]).resolve(), sys.argv[2:]
    work.mkdir(parents=True, exist_ok=True)
    os.environ.update(SETTINGS)
    items = [item for item in plan() if not chosen or any(part in str(item) for part in chosen)]
    results = Results(work / "results.json")
    left = [item for item in items if item not in results]
    for found in in_batches([item for item in left if item.runtime.partition(" x")[0] == VLLM], work):
        results.add(*found)
    for item in left:
        try:
            if item.runtime == "vLLM server":
                results.add(item, *served(made(work, item)))
            elif item.runtime == "compressed-tensors in vLLM":
                results.add(item, *corrected(made(work, item), item.name == "sum"))
            elif item.runtime == "llama.cpp":
                results.add(item, *in_llama_cpp(made(work, item), work))
        except DidNotStart as error:
            results.add(item, False, str(error))
    print(results.table(items))
    sys.exit(0 if results.right(items) else 1)


if __name__ == "__main__":
    main()
