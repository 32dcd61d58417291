"""llama.cpp on what `export --to gguf` writes, by the model card's own lines; where xllamacpp and a converter are installed."""

import json
import shutil
import subprocess
import sys

import pytest

from lrcompress.foreign.converter import CONVERTERS
from tests.serve.models import PROMPTS, compress, greedy, make_dense, tokenizer


@pytest.mark.skipif(not any(map(shutil.which, CONVERTERS)), reason="llama.cpp's converter is not installed")
@pytest.mark.parametrize("name", ["sum", "coded"])
def test_it_computes_what_the_checkpoint_does(tmp_path, name):
    """Integers number for number, first tokens the same, log-probabilities nearly (tests/serve/llama_cpp.py)."""
    pytest.importorskip("xllamacpp")
    folder = compress(make_dense("llama", tmp_path / "dense"), tmp_path / name, name)
    ids = [[0, *tokenizer()(prompt)["input_ids"]] for prompt in PROMPTS]
    (tmp_path / f"{name}.json").write_text(json.dumps({"ids": ids, "tokens": greedy(folder, ids, 6)}))
    command = [sys.executable, "-m", "tests.serve.llama_cpp", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "24 of 24 first tokens" in done.stdout
    assert ("14 weights exact" in done.stdout) == (name == "sum")
