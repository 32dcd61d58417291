"""Compiling the C files: once, kept, and never required."""

import shutil
from pathlib import Path

import pytest

from lrcompress import kernels
from lrcompress.checkpoint.cache import clear, entries
from lrcompress.kernels import native
from tests.commands import start_code


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_is_compiled_once_and_is_part_of_the_cache(fresh, monkeypatch):
    assert native.library("rans").encode_words
    (made,) = (fresh / "kernels").iterdir()
    assert [(e.kind, e.label, e.path) for e in entries()] == [("kernels", "rans, compiled", made)]
    native.library.cache_clear()
    stamp = made.stat().st_mtime_ns
    assert native.library("rans").encode_words
    assert made.stat().st_mtime_ns == stamp
    clear()
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LRCOMPRESS_NATIVE", "0", "LRCOMPRESS_NATIVE=0"),
        ("CC", "no-such-compiler", "no-such-compiler"),
        ("CC", "false", "false failed"),
    ],
)
def test_without_a_compiler_there_is_one_warning(fresh, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.warns(RuntimeWarning, match=f"{said}.*install a C compiler"):
        assert native.library("rans") is None
    assert native.library("rans") is None  # an error if it warned again
    assert not list(fresh.rglob("*.so"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("refused", ["-march=native", "-fopenmp"])
def test_what_a_compiler_cannot_do_is_done_without(fresh, monkeypatch, tmp_path, refused):
    compiler = tmp_path / "old-cc"
    compiler.write_text(f'#!/bin/sh\nfor a; do [ "$a" = {refused} ] && exit 1; done\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert native.library("rans").encode_words


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_what_cannot_be_loaded_is_done_without(fresh, monkeypatch, tmp_path):
    """As an OpenMP runtime that is not torch's: its functions are nowhere."""
    compiler = tmp_path / "cc"
    extra = tmp_path / "extra.h"
    extra.write_text("void nowhere(void);\nvoid more(void) { nowhere(); }\n")
    script = f'for a; do [ "$a" = -fopenmp ] && set -- -include {extra} "$@"; done\nexec cc "$@"\n'
    compiler.write_text(f"#!/bin/sh\n{script}")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert native.library("rans").encode_words
    assert not hasattr(native.library("rans"), "more")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_several_processes_compile_at_once(fresh):
    code = "import warnings; warnings.simplefilter('error'); from lrcompress.kernels.native import library; " \
           "assert library('rans').encode_words"  # fmt: skip
    done = [process.wait() for process in [start_code(code) for _ in range(3)]]
    assert [one.returncode for one in done] == [0, 0, 0], done
    assert len(list((fresh / "kernels").iterdir())) == 1


@pytest.fixture
def sources(fresh, monkeypatch, tmp_path):
    """The loader's folder, with a rans.c that includes a header that includes another."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "rans.c").write_text('#include <stdint.h>\n#include "outer.h"\nint answer(void) { return ANSWER; }\n')
    (folder / "outer.h").write_text('#pragma once\n  #  include "inner.h"\n')
    (folder / "inner.h").write_text('#pragma once\n#include "outer.h"\n#define ANSWER 41\n')
    monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
    return folder


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_another_header_is_another_library(sources, fresh):
    assert native.library("rans").answer() == 41
    (sources / "inner.h").write_text("#define ANSWER 42\n")
    native.library.cache_clear()
    assert native.library("rans").answer() == 42
    assert len(list((fresh / "kernels").iterdir())) == 2


@pytest.mark.parametrize("missing", ["rans.c", "outer.h", "inner.h"])
def test_what_is_not_there_is_named(sources, fresh, missing):
    (sources / missing).unlink()
    with pytest.warns(RuntimeWarning, match=rf"rans runs in numpy.*/{missing}: No such file.*install lrcompress again"):
        assert native.library("rans") is None
    assert not list(fresh.rglob("*.so"))


def test_a_source_is_beside_its_loader():
    folder = Path(kernels.__file__).parent
    assert {path.stem for path in folder.glob("*.c")} == set(native.WITHOUT)
    included = "".join(native.source_text(path) for path in folder.glob("*.c"))
    assert all(path.read_text() in included for path in folder.glob("*.h"))
