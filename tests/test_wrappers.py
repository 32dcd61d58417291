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
from lrcompress.pipeline import make_plan
from lrcompress.recipe import make_recipe
from lrcompress.report.finished import read_finished
from lrcompress.report.inspection import inspect_model
from lrcompress.report.page import make_page
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


def parts(model, names):
    """The parameters of each, counted from the model."""
    return [{"name": n, "parameters": sum(p.numel() for p in model.get_submodule(n).parameters())} for n in names]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llava", ["model.vision_tower", "model.multi_modal_projector"]),
        ("qwen3_vl", ["model.visual"]),
        ("smolvlm", ["model.vision_model", "model.connector"]),
        ("gemma4", ["model.vision_tower", "model.language_model.per_layer_model_projection", "model.embed_vision"]),
    ],
)
def test_what_stays_dense_is_named_and_counted(tokenizer, tmp_path, kind, names):
    folder, out = tmp_path / "dense", tmp_path / "out"
    expected = parts(saved(wrappers()[kind][0], tokenizer, folder), names)
    assert inspect_model(str(folder))["left_dense"] == expected
    plain = {"name": "lord", "metric": "plain"}
    report = compress_tiny(folder, out, calibration=SHORT, method=plain).report
    assert report["left_dense"] == inspect_model(str(out))["left_dense"] == expected
    asked = {"model": str(folder), "method": plain, "ratio": 0.2, "calibration": SHORT, "output": str(tmp_path / "no")}
    assert make_plan(make_recipe(asked))["left_dense"] == expected
    page = make_page(read_finished(str(out), out), out).replace("<wbr>", "")
    for part in expected:
        assert f"{part['name']} ({part['parameters'] / 1e6:.3g} M parameters)" in (out / "README.md").read_text()
        assert f"<dd>{part['name']}, {part['parameters']} parameters</dd>" in page


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
