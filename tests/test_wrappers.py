"""Models that read images beside text: their language model is compressed, everything else stays and still sees."""

import copy
import json
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText

from lrcompress.errors import InputError
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


def saved(config, tokenizer, folder):
    """A random model in a folder of its own."""
    torch.manual_seed(0)
    dense = AutoModelForImageTextToText.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    dense.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return dense


def siglip():
    """A tower that ends in torch's own attention, whose last layer is read and never called."""
    config = copy.deepcopy(wrappers()["llava"][0])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.vision_config = transformers.SiglipVisionConfig(image_size=32, patch_size=8, **sizes)
    config.vision_feature_select_strategy = "full"
    return config


BESIDE = [r"re:^(?!.*(lm_head|embed_tokens|language_model\.|text_model\.))"]
"""Every layer that is not of the language model."""


@pytest.mark.parametrize("kind", [*wrappers(), "siglip"])
def test_a_tower_compressed_by_its_weights_alone_sees_as_it_does_multiplied_out(tokenizer, tmp_path, kind):
    dense = saved(siglip() if kind == "siglip" else wrappers()[kind][0], tokenizer, tmp_path / "dense")
    result = compress_tiny(
        tmp_path / "dense", tmp_path / "out", method={"name": "ecsq", "metric": "plain"}, ratio=0.8, target=BESIDE,
        calibration=SHORT,
    )  # fmt: skip
    loaded = load(result.folder)
    stored = stored_layers(loaded)
    assert len(stored) > 6
    assert stored.keys() <= {target["name"] for target in result.report["targets"]}
    assert not any("out_proj" in name and "head" in name for name in stored)
    assert [part["name"] for part in result.report["left_dense"]] == (
        ["model.language_model.per_layer_model_projection"] if kind == "gemma4" else []
    )
    assert "held_out" not in result.report
    assert any(f"says nothing of {len(stored)} of the {len(stored)}" in said for said in result.report["warnings"])
    reads = seeing("llava" if kind == "siglip" else kind, torch.tensor([[5, *[IMAGE] * 16, 7, 8, 9]]))
    with torch.no_grad():
        before = dense(**reads).logits
        for name, layer in stored.items():
            dense.get_submodule(name).weight = nn.Parameter(dense_parts(layer)[0])
        expected = dense(**reads).logits
        assert (expected - before).abs().max() > 1e-4 * before.abs().max()
        assert (loaded(**reads).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        written = [m.generate(**reads, max_new_tokens=6, min_new_tokens=6, do_sample=False) for m in (dense, loaded)]
    assert torch.equal(*written)


def test_targets_that_no_text_reaches_are_refused_before_the_work_with_cures_that_work(tokenizer, tmp_path):
    saved(wrappers()["llava"][0], tokenizer, tmp_path / "dense")
    recipe = {"calibration": SHORT, "target": ["*.mlp.*", "*vision_tower*self_attn*"]}
    with pytest.raises(
        InputError, match=r"no text reaches model\.vision_tower\.encoder\.layers\.0.* and 11 other"
    ) as error:
        compress_tiny(tmp_path / "dense", tmp_path / "out", **recipe)
    assert not (tmp_path / "out").exists()
    (ignored,) = re.findall(r"--ignore '(.+?)'", str(error.value))
    result = compress_tiny(tmp_path / "dense", tmp_path / "out", **recipe, ignore=[ignored])
    assert {target["name"].split(".")[1] for target in result.report["targets"]} == {"language_model"}
    assert "--method ecsq --set metric=plain" in str(error.value)
    plain = {**recipe, "method": {"name": "ecsq", "metric": "plain"}, "ratio": 0.8}
    result = compress_tiny(tmp_path / "dense", tmp_path / "both", **plain)
    assert {target["name"].split(".")[1] for target in result.report["targets"]} == {"language_model", "vision_tower"}
    coded = [target["name"] for target in result.report["targets"] if target["format"] == "coded"]
    unread = sum("vision" in name for name in coded)
    assert 0 < unread < len(coded)
    assert any(f"says nothing of {unread} of the {len(coded)}" in said for said in result.report["warnings"])
    assert result.report["held_out"]["perplexity"] > 0
    with pytest.raises(InputError, match="--max-loss is measured on text, which does not reach model.vision_tower"):
        compress_tiny(tmp_path / "dense", tmp_path / "lost", **{**plain, "ratio": None, "max_loss": 0.1})


@pytest.mark.parametrize("kind", list(wrappers()))
def test_the_language_model_is_compressed_and_the_tower_still_sees(tokenizer, tmp_path, kind):
    dense = saved(wrappers()[kind][0], tokenizer, tmp_path / "dense")
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
    tower_parts = ("visual", "vision_tower", "vision_model", "projector", "connector", "embed_vision")
    tower = [name for name in before if any(part in name.split(".")[1] or f".{part}" in name for part in tower_parts)]
    assert len(tower) > 20
    assert all(torch.equal(after[name], before[name]) for name in tower)
    left = {part["name"]: part["parameters"] for part in result.report["left_dense"]}
    beside = sum(size for name, size in left.items() if any(part in name for part in tower_parts))
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
