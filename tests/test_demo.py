"""The real SmolLM2-135M-Instruct in GGUF, where the optional demo package is installed."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.folders import cache_folder
from lrcompress.foreign.converter import CONVERTERS
from lrcompress.foreign.opening import demo_file, open_dense
from lrcompress.formats import StoredLinear
from lrcompress.model.surgery import dense_parts
from lrcompress.recipe import shipped_recipes
from tests.commands import run_cli
from tests.conftest import compress_tiny, needs_demo

pytestmark = [needs_demo, pytest.mark.demo]


@pytest.mark.slow
def test_gguf_is_dequantised_as_transformers_does():
    opened = open_dense("demo")
    path = demo_file()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    reader = CheckpointReader(opened.folder)
    ours = dict(reader.read(reader.names()))
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert json.loads((opened.folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    ids = AutoTokenizer.from_pretrained(opened.folder)("Low rank, says the oracle.").input_ids
    assert (
        ids == AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)("Low rank, says the oracle.").input_ids
    )
    assert open_dense("demo").folder == opened.folder
    assert [path.name for path in (cache_folder() / "converted").iterdir()].count(opened.folder.name) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"sweep"}))
def test_shipped_recipes_at_reduced_size(name, tmp_path):
    """Every recipe of the package runs; its expectations on quality are replaced, its size reduced. The quickstart does
    so from a wheel in cli/test_wheel.py."""
    if name == "ggml" and not any(map(shutil.which, CONVERTERS)):
        pytest.skip("llama.cpp's converter is not installed")
    done = run_cli(
        "run", name, "-o", tmp_path / "out", "--set", "calibration.samples=2", "--set", "calibration.seqlen=64",
        "--set", "evaluate.limit=1", "--set", "evaluate.tasks=[tokens:python-docs@64]",
        "--set", "expect=[token_perplexity <= 1e9]", "--set", r"target=['re:layers\.17\.self_attn']", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["ratio"]["stored"] >= (report["ratio"]["asked"] or 0)


def perplexity(model, ids):
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(input_ids=b[None]).logits[0, :-1].float(), b[1:]) for b in ids
        ]
    return math.exp(float(torch.stack(losses).mean()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lord", "welore"])
def test_written_and_loaded_equals_dense_in_place(method, tmp_path):
    """In a fresh process, at the written dtype, to 0.1 %."""
    result = compress_tiny(
        Path("demo"),
        tmp_path / "out",
        method=method,
        calibration={"source": "python-docs", "samples": 8, "seqlen": 512},
    )
    code = f"""
import lrcompress, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(result.folder)!r}, dtype=torch.float32).eval()
ids = torch.load({str(tmp_path / "ids.pt")!r}, weights_only=True)
with torch.no_grad():
    losses = [torch.nn.functional.cross_entropy(model(input_ids=b[None]).logits[0, :-1].float(), b[1:]) for b in ids]
print(torch.stack(losses).mean().exp().item())
"""
    opened = open_dense("demo")
    from pydoc_data.topics import topics

    tokens = AutoTokenizer.from_pretrained(opened.folder)(topics["for"] * 4, return_tensors="pt").input_ids[0]
    ids = tokens[: len(tokens) // 256 * 256].reshape(-1, 256)[:8]
    torch.save(ids, tmp_path / "ids.pt")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    compressed = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(opened.folder, dtype=torch.float32)
    for parameter in dense.parameters():  # not .to(), which would round the rotary buffers too
        parameter.data = parameter.data.bfloat16().float()
    for name, module in compressed.named_modules():
        if isinstance(module, StoredLinear):
            weight, bias = dense_parts(module)
            layer = dense.get_submodule(name)
            layer.weight.data = weight
            layer.bias = None if bias is None else torch.nn.Parameter(bias)
    assert float(done.stdout) == pytest.approx(perplexity(dense, ids), rel=1e-3)
