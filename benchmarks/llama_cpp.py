#!/usr/bin/env python3
"""llama.cpp itself, through the libraries of llama-cpp-py-sync: quantising with an imatrix, logits and speed of files.

Run by benchmarks/gguf_files.py with the Python of an environment that has `pip install llama-cpp-py-sync gguf numpy`. Where that
wheel's libraries ask for a newer glibc than there is (only for C23's names of strtol and sscanf), `--fit` changes what
they ask for, in place, and compiles the four names beside them.

usage: llama_cpp.py --fit | quantize IN OUT TYPE [IMATRIX.npz] | logits FILE TOKENS.npy OUT.npy | speed TOKENS.npy FILE ...
"""

import ctypes
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25, "IQ4_XS": 30,
    "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29,
    "MXFP4_MOE": 38,
}  # fmt: skip
FOLLOWING, ROUNDS = 64, 3
LIBRARIES = ("libggml-base.so.0", "libggml-cpu.so.0", "libggml.so.0", "libllama.so.0")
SHIM = """
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
long __isoc23_strtol(const char *s, char **e, int b) { return strtol(s, e, b); }
unsigned long __isoc23_strtoul(const char *s, char **e, int b) { return strtoul(s, e, b); }
unsigned long long __isoc23_strtoull(const char *s, char **e, int b) { return strtoull(s, e, b); }
int __isoc23_sscanf(const char *s, const char *f, ...) {
    va_list a; va_start(a, f); int r = vsscanf(s, f, a); va_end(a); return r;
}
"""


def folder() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llama_cpp_py_sync")
    if spec is None or spec.origin is None:
        raise SystemExit("llama-cpp-py-sync is not installed here: pip install llama-cpp-py-sync gguf numpy")
    return Path(spec.origin).parent


def fit() -> None:
    """Let the libraries load on a glibc before 2.38."""

    def elf_hash(name: str) -> bytes:
        found = 0
        for character in name.encode():
            found = (found << 4) + character
            high = found & 0xF0000000
            found = (found ^ (high >> 24)) & ~high & 0xFFFFFFFF
        return struct.pack("<I", found)

    for path in folder().glob("*.so*"):
        data = path.read_bytes()
        if b"\0GLIBC_2.38\0" in data:
            data = data.replace(b"\0GLIBC_2.38\0", b"\0GLIBC_2.34\0")
            path.write_bytes(data.replace(elf_hash("GLIBC_2.38"), elf_hash("GLIBC_2.34")))
    source = folder() / "shim.c"
    source.write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-std=gnu11", "-o", folder() / "shim.so", source], check=True)


def library() -> ctypes.CDLL:
    shim = folder() / "shim.so"
    for path in [*([shim] if shim.exists() else []), *(folder() / name for name in LIBRARIES)]:
        found = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return found


class Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t)]


class Parameters(ctypes.Structure):
    """llama_model_quantize_params of October 2026."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("threads", "file_type", "output", "embeddings")),
        *((name, ctypes.c_bool) for name in ("again", "quantise_output", "copy", "pure", "keep_split", "dry")),
        ("importance", ctypes.POINTER(Importance)),
        *((name, ctypes.c_void_p) for name in ("overrides", "tensors", "pruned")),
        ("most", ctypes.c_size_t),
    ]


def quantize(source: str, target: str, kind: str, imatrix: str | None = None) -> None:
    """llama_model_quantize, as llama-quantize calls it."""
    native = library()
    native.llama_model_quantize_default_params.restype = Parameters
    native.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    native.llama_backend_init()
    parameters = native.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = 1, FILE_TYPES[kind]
    values = {} if imatrix is None else {k: np.ascontiguousarray(v, np.float32) for k, v in np.load(imatrix).items()}
    entries = (Importance * (len(values) + 1))()
    for index, (name, value) in enumerate(values.items()):
        data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entries[index] = Importance(name.encode(), data, value.size)
    if values:
        parameters.importance = entries
    if native.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama_model_quantize failed on {source}")


class Runner:
    """A file, loaded by llama.cpp with room for `length` tokens and FOLLOWING more."""

    def __init__(self, file: str, length: int) -> None:
        library()
        from llama_cpp_py_sync import _cffi_bindings as bindings

        self.file, self.ffi, self.native = file, bindings.ffi, bindings.get_lib()
        parameters = self.native.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length + FOLLOWING
        parameters.n_threads = parameters.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", "1"))
        self.native.llama_backend_init()
        model = self.native.llama_model_load_from_file(file.encode(), self.native.llama_model_default_params())
        if model == self.ffi.NULL:
            raise SystemExit(f"llama.cpp does not load {file}")
        self.vocabulary = self.native.llama_vocab_n_tokens(self.native.llama_model_get_vocab(model))
        self.context: Any = self.native.llama_init_from_model(model, parameters)
        self.batch = self.native.llama_batch_init(length + FOLLOWING, 0, 1)

    def clear(self) -> None:
        self.native.llama_memory_clear(self.native.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int], first: int = 0, every: bool = True) -> None:
        """Tokens that follow `first` others; with the logits of every one, or of the last."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, first + place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, every or place == len(tokens) - 1
        if self.native.llama_decode(self.context, batch):
            raise SystemExit(f"llama.cpp cannot run {self.file}")

    def logits(self, count: int) -> np.ndarray:
        values = self.native.llama_get_logits(self.context)
        buffer = self.ffi.buffer(values, 4 * count * self.vocabulary)
        return np.frombuffer(buffer, np.float32).reshape(count, self.vocabulary)


def logits(file: str, tokens: str, output: str) -> None:
    """float32 (windows, length, vocabulary) of tokens (windows, length), a window at a time, into an .npy file."""
    windows = np.load(tokens).astype(np.int32)
    runner = Runner(file, windows.shape[1])
    found = np.lib.format.open_memmap(output, "w+", np.float32, (*windows.shape, runner.vocabulary))
    for index, window in enumerate(windows):
        runner.clear()
        runner.decode(window.tolist())
        found[index] = runner.logits(len(window))
    found.flush()
    os._exit(0)  # what the bindings free at the end has been freed by then


def speed(tokens: str, *files: str) -> None:
    """Tokens a second of every file, a prompt's and the FOLLOWING ones', the best of ROUNDS in turn."""
    window = np.load(tokens).astype(np.int32)[0].tolist()
    runners, best = [Runner(file, len(window)) for file in files], [[0.0, 0.0] for _ in files]
    for _ in range(ROUNDS):
        for runner, own in zip(runners, best, strict=True):
            runner.clear()
            start = time.perf_counter()
            runner.decode(window, every=False)
            middle = time.perf_counter()
            for place in range(FOLLOWING):
                runner.decode(window[place : place + 1], len(window) + place)
            end = time.perf_counter()
            own[:] = max(own[0], len(window) / (middle - start)), max(own[1], FOLLOWING / (end - middle))
    for file, (prompt, following) in zip(files, best, strict=True):
        print(f"| {Path(file).name} | {prompt:.1f} | {following:.1f} |")
    sys.stdout.flush()
    os._exit(0)  # what the bindings free at the end has been freed by then


if __name__ == "__main__":
    task, *arguments = sys.argv[1:] or ["--help"]
    if task == "--fit":
        fit()
    elif task in ("quantize", "logits", "speed"):
        {"quantize": quantize, "logits": logits, "speed": speed}[task](*arguments)
    else:
        raise SystemExit(__doc__)
