"""The command line, and other code, in processes of their own that need not import anything: they fork from a server."""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.preloaded"])


class Running:
    """A process that was started; its output lies in files until it is waited for."""

    def __init__(self, target: Any, command: list[str], environment: dict[str, str], **how: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.command = command
        self._out, self._err = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        self._out.touch()  # it may be killed before it opens them
        self._err.touch()
        self.process = _server.Process(
            target=_begin, args=(target, command, {**os.environ, **environment}, self._out, self._err), kwargs=how
        )
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def send(self, number: signal.Signals) -> None:
        """A signal, if it still runs."""
        if self.running:
            os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        self.process.join(timeout)
        if self.running:
            self.send(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.command, timeout)
        with self._folder:
            return subprocess.CompletedProcess(
                self.command, self.process.exitcode, self._out.read_text(), self._err.read_text()
            )


def start_cli(*args: Any, environment: dict[str, str] | None = None, **how: Any) -> Running:
    """`python -m lrcompress ARGS` begun; cwd: its folder, largest_file: bytes, after which its disk is full."""
    return Running(_lrcompress, [*map(str, args)], environment or {}, **how)


def run_cli(*args: Any, timeout: float = 300, **how: Any) -> subprocess.CompletedProcess[str]:
    """`start_cli`, waited for."""
    return start_cli(*args, **how).wait(timeout)


def start_code(code: str, *args: Any, environment: dict[str, str] | None = None) -> Running:
    """`python -c CODE ARGS` begun, where everything is imported already."""
    return Running(_code, [code, *map(str, args)], environment or {})


def run_code(code: str, *args: Any, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`start_code`, waited for."""
    return start_code(code, *args, environment=environment).wait()


def _begin(
    target: Any, command: list[str], environment: dict[str, str], out: Path, err: Path, cwd: Path | None = None,
    largest_file: int | None = None,
) -> None:  # fmt: skip
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    # A suite that runs in the background of a shell has been told to ignore Ctrl-C, and so would this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    target(command)


def _lrcompress(command: list[str]) -> None:
    sys.argv = ["lrcompress", *command]
    runpy.run_module("lrcompress", run_name="__main__", alter_sys=True)


def _code(command: list[str]) -> None:
    code, *sys.argv[1:] = command
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
