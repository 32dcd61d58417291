#!/usr/bin/env python3
"""llama.cpp itself, through the libraries of llama-cpp-py-sync: quantising with an imatrix, and logits of a file.

Run by benchmarks/gguf_files.py with the Python of an environment that has `pip install llama-cpp-py-sync gguf numpy`. Where that
wheel's libraries ask for a newer glibc than there is (only for C23's names of strtol and sscanf), `--fit` changes what
they ask for, in place, and compiles the four names beside them.

usage: llama_cpp.py --fit | quantize IN OUT TYPE [IMATRIX.npz] | logits FILE TOKENS.npy OUT.npy
"""

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25, "IQ4_XS": 30,
    "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29,
    "MXFP4_MOE": 38,
}  # fmt: skip
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


def logits(file: str, tokens: str, output: str) -> None:
    """float32 (windows, length, vocabulary) of tokens (windows, length), a window at a time, into an .npy file."""
    library()
    from llama_cpp_py_sync import _cffi_bindings as bindings

    ffi, native = bindings.ffi, bindings.get_lib()
    windows = np.load(tokens).astype(np.int32)
    parameters = native.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = windows.shape[1]
    parameters.n_threads = parameters.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", "1"))
    native.llama_backend_init()
    model = native.llama_model_load_from_file(file.encode(), native.llama_model_default_params())
    if model == ffi.NULL:
        raise SystemExit(f"llama.cpp does not load {file}")
    vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
    found = np.lib.format.open_memmap(output, "w+", np.float32, (*windows.shape, vocabulary))
    context: Any = native.llama_init_from_model(model, parameters)
    batch = native.llama_batch_init(windows.shape[1], 0, 1)
    for index, window in enumerate(windows):
        native.llama_memory_clear(native.llama_get_memory(context), True)
        batch.n_tokens = len(window)
        for place, token in enumerate(window.tolist()):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        if native.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp cannot run {file}")
        values = native.llama_get_logits(context)
        found[index] = np.frombuffer(ffi.buffer(values, 4 * len(window) * vocabulary), np.float32).reshape(
            found[0].shape
        )
    found.flush()
    os._exit(0)  # what the bindings free at the end has been freed by then


if __name__ == "__main__":
    task, *arguments = sys.argv[1:] or ["--help"]
    if task == "--fit":
        fit()
    elif task in ("quantize", "logits"):
        {"quantize": quantize, "logits": logits}[task](*arguments)
    else:
        raise SystemExit(__doc__)
