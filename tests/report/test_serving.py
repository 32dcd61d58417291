"""Commands of model cards, run as they stand: transformers' here, vLLM's and llama.cpp's by tests/serve."""

import re

import pytest
import torch

from lrcompress.export.compressed_tensors import export_compressed_tensors
from lrcompress.export.dense import export_dense
from lrcompress.export.peft import export_peft
from tests.checkpoint.test_loading import IDS, load, logits
from tests.conftest import compress_tiny


def pasted(card, folder):
    """The names that a card's first Python block leaves, its folder put in; floats in the checkpoint's own dtype."""
    block = re.search(r"^```python\n(.*?)^```", card.read_text(), flags=re.M | re.S)[1]
    space = {}
    exec(block.replace("path/of/this/folder", str(folder)), space)
    return space


@pytest.fixture(scope="module")
def eora(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eora") / "out"
    compress_tiny(llama, folder, method="eora", base="rtn:3:16", ratio=None, rank=3, dtype="float32")
    return folder


def test_the_cards_lines_load_the_model_and_its_tokenizer(eora):
    space = pasted(eora / "README.md", eora)
    assert torch.equal(logits(space["model"].eval(), IDS), logits(load(eora), IDS))
    assert space["tokenizer"]("a word").input_ids


@pytest.mark.parametrize("export", [export_dense, export_peft, export_compressed_tensors])
def test_so_do_those_of_its_exports(eora, tmp_path, export):
    if export is export_compressed_tensors:
        pytest.importorskip("compressed_tensors", reason="needs the extra compressed-tensors")
    export(str(eora), tmp_path / "out")
    card = tmp_path / "out/README.md"
    model = pasted(card, tmp_path / "out")["model"].eval()
    torch.testing.assert_close(logits(model, IDS), logits(load(eora), IDS), rtol=1e-3, atol=1e-3)


def test_vllm_is_named_where_it_has_a_place(make_model, eora, tmp_path):
    """The plugin refuses by the same rule."""
    command = "python -m vllm.entrypoints.openai.api_server --model path/of/this/folder"
    cards = {}
    for name, recipe in {
        "gpt2": {},
        "llama": {"method": "ecsq", "ratio": None, "bpw": 6, "target": ["model.embed_tokens", "*_proj"]},
        "mixtral": {"method": {"name": "lord", "metric": "centred"}},
    }.items():
        compress_tiny(make_model(name), tmp_path / name, **recipe)
        cards[name] = (tmp_path / name / "README.md").read_text()
    for name, words in {"gpt2": "Conv1D", "llama": "embeddings", "mixtral": "experts with biases"}.items():
        assert re.search(f"vLLM has no place for .*{words}", cards[name])
        assert command not in cards[name]
    assert command in (eora / "README.md").read_text()


def test_a_lora_is_named_where_the_export_writes_one(eora, llama, tmp_path):
    """Rows of 48 numbers are in no block, those of 32 are."""
    assert '"model-lora.gguf", 1.0' in (eora / "README.md").read_text()
    recipe = {"method": "eora", "base": "rtn:3:16", "ratio": None, "rank": 3}
    compress_tiny(llama, tmp_path / "out", target=["*.down_proj"], **recipe)
    assert "lora" not in (tmp_path / "out/README.md").read_text().partition("## Serve")[2]
