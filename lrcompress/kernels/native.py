"""Compile the C files beside this one, and the headers they include, with the system's compiler, once a machine."""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch  # noqa: F401 (has an OpenMP runtime, which libraries find)

from lrcompress.folders import cache_folder

FOLDER = "kernels"
"""Of the cache, for compiled libraries."""
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-w")
WAYS = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""More flags, the best first: what a compiler cannot do, or what cannot be loaded, is done without. The OpenMP that is
loaded is the one that torch's wheels bring."""
WITHOUT = {
    "rans": "runs in numpy, many times slower",
    "feedback": "is done by torch, many times slower",
    "pursuit": "of sparse codes is done by torch, somewhat slower",
    "rows": "decodes in plain torch, many times slower",
    "blocks": "are rounded by torch, many times slower, 32 rows of a weight at a time",
    "panels": "of weights are multiplied by torch, somewhat slower in bfloat16",
    "tiles": "are not used: coded weights take 8 bits or more each in memory",
}
"""What is said where a library cannot be had."""
CURE = "install a C compiler (cc, or name one by CC) for speed; results are as good without"
AGAIN = "install lrcompress again for speed; results are as good without"
INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `name`.c of this folder; None, said once by a warning, where it cannot be had.

    LRCOMPRESS_NATIVE=0 asks for None. Calls into the library run without the interpreter's lock. Loops in parallel run
    in torch's own threads: a library is linked without an OpenMP runtime, and finds the one that torch has loaded.
    """
    if os.environ.get("LRCOMPRESS_NATIVE") == "0":
        _warn(name, "LRCOMPRESS_NATIVE=0")
        return None
    compiler = shlex.split(os.environ.get("CC") or "cc")
    source = Path(__file__).with_name(f"{name}.c")
    try:
        text = source_text(source)
    except OSError as error:
        _warn(name, f"{error.filename}: {error.strerror}", AGAIN)
        return None
    try:
        return _compiled(source, text, compiler)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or ["it said nothing"]
        _warn(name, f"{compiler[0]} failed: {lines[0]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn(name, str(error))
    return None


def _warn(name: str, reason: str, cure: str = CURE) -> None:
    warnings.warn(f"{name} {WITHOUT[name]} ({reason}); {cure}", RuntimeWarning, stacklevel=3)


def source_text(source: Path) -> str:
    """A C file and every file of its folder that it includes, directly or not, each once with its name before it.

    OSError, with its file name, where one cannot be read.
    """
    texts, waiting = {}, [source]
    while waiting:
        path = waiting.pop()
        if path.name not in texts:
            texts[path.name] = path.read_text(encoding="utf8")
            waiting += [path.with_name(name) for name in INCLUDED.findall(texts[path.name])]
    return "\n".join(f"{name}\n{text}" for name, text in texts.items())


def _compiled(source: Path, text: str, compiler: list[str]) -> ctypes.CDLL:
    """The library of a C file, all of whose text is given: from the cache folder, or made and put there."""
    version = _run([*compiler, "--version"])
    key = "\n".join([text, version, *compiler, *FLAGS, repr(WAYS), processor()])
    target = cache_folder() / FOLDER / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compiling-") as folder:
        made = _made(source, compiler, Path(folder))
        made.replace(target)
    return ctypes.CDLL(str(target))


def _made(source: Path, compiler: list[str], folder: Path) -> Path:
    """A library in `folder`, made in the best way whose outcome can be loaded here."""
    for place, way in enumerate(WAYS):
        # A name for each: the loader knows a library that it has failed to load by its name.
        compiled, made = folder / f"{place}.o", folder / f"{place}.so"
        try:
            _run([*compiler, *FLAGS, *way, "-c", str(source), "-o", str(compiled)])
            _run([*compiler, "-shared", str(compiled), "-o", str(made)])
            ctypes.CDLL(str(made))
        except (subprocess.CalledProcessError, OSError):
            if place + 1 == len(WAYS):
                raise
            continue
        break
    return made


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def processor() -> str:
    """This machine's, all that -march=native depends on: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), *sorted(set(told))])
