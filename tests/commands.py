"""The command line in processes of its own that need not import torch first: they fork from a server that did.

The server has imported the libraries only, nothing of lrcompress, and never run them.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIBRARIES = ["torch", "transformers", "transformers.models.llama.modeling_llama", "lm_eval.evaluator", "typer", "rich"]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


def run_cli(*args: Any, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m lrcompress ARGS` in a process of its own."""
    command = [*map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _server.Process(target=_main, args=(command, cwd, dict(os.environ), out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def _main(command: list[str], cwd: Path | None, environment: dict[str, str], out: Path, err: Path) -> None:
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["lrcompress", *command]
    runpy.run_module("lrcompress", run_name="__main__", alter_sys=True)
