"""`make serve-check`: our checkpoints in vLLM and llama.cpp beside transformers, in a virtual environment of their own.

check.py WORK [NAME...]: tiny models of every kind are made in the folder WORK, and kept there; a NAME is a part of
ARCHITECTURE/FORMAT, none is all. Ends with exit code 1 where a token differs or a server does not answer.
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.serve.generate import SETTINGS
from tests.serve.models import PROMPTS, RECIPES, compress, greedy, make_dense

OTHERS = {"qwen3": ("low_rank", "sum", "coded"), "gemma3": ("pivoted", "quantized", "coded"), "mixtral": ("attention",)}
"""What is made of other models than the Llama, of which there is everything."""

SPLIT = {
    2: ("pivoted", "joined", "coded", "quantized", "sum_of_codes", "sparse_sum", "dictionary"),
    3: ("low_rank", "coded", "sum"),
}
"""Of the Llama, in so many processes."""

TOKENS, PORT = 32, 8377
ATTENTION = {**RECIPES["low_rank"], "ignore": ["*experts*"]}


def made(work: Path, architecture: str, name: str) -> Path:
    """The checkpoint, with transformers' tokens beside it."""
    from transformers import AutoTokenizer

    folder = work / architecture / name
    dense = folder.with_name("dense")
    if not dense.is_dir():
        make_dense(architecture, dense)
    if not folder.with_name(f"{name}.json").is_file():
        if not folder.is_dir():
            compress(dense, folder, RECIPES.get(name, ATTENTION))
        tokenizer = AutoTokenizer.from_pretrained(dense)
        ids = [[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]] for prompt in PROMPTS]
        found = {"ids": ids, "tokens": greedy(folder, ids, TOKENS)}
        folder.with_name(f"{name}.json").write_text(json.dumps(found))
    return folder


def generated(processes: int, folders: list[Path]) -> list[dict[str, Any]]:
    """What vLLM finds in one process, or in several for every folder anew."""
    command = [sys.executable, "-m", "tests.serve.generate", str(processes)]
    batches = [folders] if processes == 1 else [[folder] for folder in folders]
    found = []
    for batch in batches:
        done = subprocess.run([*command, *map(str, batch)], capture_output=True, text=True, check=False)
        lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        found += [json.loads(line) for line in lines]
        if len(lines) < len(batch):
            print(done.stderr[-3000:])
            found.append(
                {"folder": str(batch[len(lines)]), "processes": processes, "same": 0, "of": len(PROMPTS) * TOKENS}
            )
    return found


def answers(folder: Path) -> bool:
    """Whether the command that the model card names answers a completion and a chat."""
    import os

    card = (folder / "README.md").read_text()
    said = next(line for line in card.splitlines() if line.startswith("python -m vllm.entrypoints"))
    command = [sys.executable, *said.replace("path/of/this/folder", str(folder)).split()[1:]]
    command += ["--port", str(PORT), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    server = subprocess.Popen(
        command, env={**os.environ, **SETTINGS}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            if server.poll() is not None:
                return False
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(2)
        common = {"model": str(folder), "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        wanted = json.loads(folder.with_name(f"{folder.name}.json").read_text())
        text = _ask("completions", {**common, "prompt": wanted["ids"][0], "return_token_ids": True})["choices"][0]
        chat = _ask("chat/completions", {**common, "messages": [{"role": "user", "content": "The"}]})["choices"][0]
        return text["token_ids"] == wanted["tokens"][0] and bool(chat["message"]["content"])
    finally:
        server.terminate()
        server.wait(60)


def _ask(what: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def main() -> None:
    work, chosen = Path(sys.argv[1]).resolve(), sys.argv[2:]
    plan = [("llama", name) for name in RECIPES] + [(kind, name) for kind, names in OTHERS.items() for name in names]
    plan = [(kind, name) for kind, name in plan if not chosen or any(part in f"{kind}/{name}" for part in chosen)]
    results = generated(1, [made(work, kind, name) for kind, name in plan])
    for processes, names in SPLIT.items():
        results += generated(processes, [made(work, "llama", name) for name in names if ("llama", name) in plan])
    for line in results:
        print(f"{line['processes']} {line['folder']}: {line['same']} of {line['of']} tokens equal transformers'")
    served = answers(made(work, "llama", "low_rank"))
    print(f"OpenAI server answers a completion and a chat: {served}")
    sys.exit(0 if served and all(line["same"] == line["of"] for line in results) else 1)


if __name__ == "__main__":
    main()
