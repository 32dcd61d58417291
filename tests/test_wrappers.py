"""Models that read images beside text: their language model is compressed, everything else stays and still sees."""

import copy
import json
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText

from lrcompress.evaluation.loading import load_model
from lrcompress.export.dense import export_dense
from lrcompress.model.skeleton import find_blocks
from lrcompress.model.surgery import dense_parts, stored_layers
from tests.architectures import wrappers
from tests.conftest import compress_tiny

SHORT = {"source": "python-docs", "samples": 2, "seqlen": 32}
IMAGE = 300


def load(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def seeing(kind, ids):
    """What a model of this kind is called with for a text that holds an image."""
    reads = dict(wrappers()[kind][1])
    if kind in ("qwen3_vl", "gemma4"):
        reads["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **reads}


@pytest.mark.parametrize("kind", list(wrappers()))
def test_the_language_model_is_compressed_and_the_tower_still_sees(tokenizer, tmp_path, kind):
    torch.manual_seed(0)
    dense = AutoModelForImageTextToText.from_config(copy.deepcopy(wrappers()[kind][0])).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    result = compress_tiny(
        tmp_path / "dense", tmp_path / "out", method={"name": "lord", "metric": "input"}, calibration=SHORT
    )
    assert (result.folder / "preprocessor_config.json").read_text() == '{"image_mean": [0.5, 0.5, 0.5]}'
    (named,) = set(re.findall(r"AutoModelFor\w+", (result.folder / "README.md").read_text()))
    assert type(getattr(transformers, named).from_pretrained(result.folder)) is type(dense)
    loaded = load(result.folder)
    assert type(loaded) is type(dense)
    assert type(load_model(str(result.folder), device="cpu").model) is type(dense)
    blocks = find_blocks(dense)
    layers = [
        n for n, m in dense.named_modules() if type(m) is nn.Linear and n.startswith(tuple(f"{b}." for b in blocks))
    ]
    assert len(blocks) == 2
    assert set(layers) <= set(stored_layers(loaded)) == {target["name"] for target in result.report["targets"]}
    before, after = dense.state_dict(), loaded.state_dict()
    parts = ("visual", "vision_tower", "vision_model", "projector", "connector", "embed_vision")
    tower = [name for name in before if any(part in name.split(".")[1] or f".{part}" in name for part in parts)]
    assert len(tower) > 20
    assert all(torch.equal(after[name], before[name]) for name in tower)
    left = {part["name"]: part["parameters"] for part in result.report["left_dense"]}
    beside = sum(size for name, size in left.items() if any(part in name for part in parts))
    assert beside == sum(before[name].numel() for name in tower)
    for name, layer in stored_layers(loaded).items():
        dense.get_submodule(name).weight = nn.Parameter(dense_parts(layer)[0])
    ids = torch.tensor([[5, *[IMAGE] * 16, 7, 8, 9]])
    reads = seeing(kind, ids)
    with torch.no_grad():
        expected = dense(**reads).logits
        assert (loaded(**reads).logits - expected).abs().max() < 2e-4 * expected.abs().max()
        other = {**reads, "pixel_values": reads["pixel_values"].flip(-1)}
        assert (dense(**other).logits - expected).abs().max() > 1e-3 * expected.abs().max()
        written = [m.generate(**reads, max_new_tokens=6, min_new_tokens=6, do_sample=False) for m in (dense, loaded)]
    assert torch.equal(*written)
    export_dense(str(result.folder), tmp_path / "exported")
    exported = load(tmp_path / "exported")
    with torch.no_grad():
        assert (exported(**reads).logits - expected).abs().max() < 2e-4 * expected.abs().max()
    assert json.loads((result.folder / "config.json").read_text())["architectures"] == [type(dense).__name__]
