"""vLLM's OpenAI server, started with the commands that model cards name."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.serve.generate import SETTINGS
from tests.serve.models import contexts, log_probabilities, nearness

PORT, STARTING = 8377, 300


@contextmanager
def server(card: Path, *options: str) -> Iterator[None]:
    """What the card says, with `options`, until it answers; and stopped in the end."""
    said = card.read_text().replace("\\\n", " ")
    line = next(line for line in said.splitlines() if line.startswith("python -m vllm.entrypoints"))
    command = [sys.executable, *line.replace("path/of/this/folder", str(card.parent)).split()[1:]]
    command += ["--port", str(PORT), "--enforce-eager", "--max-model-len", "128", *options]
    with tempfile.TemporaryFile() as log:
        running = subprocess.Popen(
            command, env={**os.environ, **SETTINGS, "VLLM_CPU_INT4_W4A8": "0"}, stdout=log, stderr=log
        )
        try:
            begun = time.monotonic()
            while not _healthy():
                if running.poll() is not None or time.monotonic() - begun > STARTING:
                    log.seek(0)
                    raise DidNotStart(f"{line} did not start: {log.read().decode()[-2000:]}")
                time.sleep(1)
            yield
        finally:
            running.terminate()
            running.wait(60)


class DidNotStart(Exception):
    """The server ended, or took too long."""


def _healthy() -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def ask(what: str, body: dict[str, Any]) -> Any:
    """The first choice of an answer to a request at v1/`what`, greedily."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/{what}",
        json.dumps({"temperature": 0, "ignore_eos": True, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]


def served(folder: Path) -> tuple[bool, str]:
    """Whether a completion has transformers' tokens, and a chat those of its prompt."""
    wanted = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    length = len(wanted["tokens"][0])
    with server(folder / "README.md", "--dtype", "float32"):
        common = {"model": str(folder), "max_tokens": length, "return_token_ids": True}
        text = ask("completions", {**common, "prompt": wanted["ids"][0]})
        chat = ask("chat/completions", {**common, "messages": [{"role": "user", "content": "The"}]})
    right = text["token_ids"] == wanted["tokens"][0] and len(chat["token_ids"]) == length and bool(
        chat["message"]["content"]
    )  # fmt: skip
    return right, "completion, chat" if right else f"completion {text}, chat {chat}"


def corrected(folder: Path, adapted: bool) -> tuple[bool, str]:
    """`export --to compressed-tensors` and its card's command, in bfloat16, with the correction where there is one."""
    wanted = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    texts = contexts(wanted["ids"], wanted["tokens"])
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [Path(sys.executable).with_name("lrcompress"), "export", folder, "--to", "compressed-tensors"]
        done = subprocess.run([*command, "-o", out], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return False, done.stderr[-500:]
        with server(out / "README.md", "--dtype", "bfloat16"):
            body = {"model": "corrected" if adapted else str(out), "max_tokens": 1, "logprobs": 20}
            answers = [ask("completions", {**body, "prompt": ids, "return_tokens_as_token_ids": True}) for ids in texts]
    found = [
        {int(re.sub(r"\D", "", key)): value for key, value in answer["logprobs"]["top_logprobs"][0].items()}
        for answer in answers
    ]
    return nearness(found, log_probabilities(folder, texts))
