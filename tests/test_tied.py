"""Models whose config ties the output head to the embeddings: what the files hold decides, as in transformers."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.calibration.corpus import parse_source
from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.checkpoint.experts import open_skeleton
from lrcompress.errors import InputError
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.probing import probe
from lrcompress.pipeline import compress
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.training.distill import open_teacher
from tests.conftest import compress_tiny

IDS = torch.arange(2, 22)
EMBEDDINGS = {"qwen3": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@pytest.fixture
def stored(make_model, tmp_path):
    """stored(how, architecture): a tied model's folder with `two` matrices, two `equal` ones, the `head` or `neither`."""

    def make(how, architecture="qwen3"):
        folder, name = tmp_path / how, EMBEDDINGS[architecture]
        shutil.copytree(make_model(architecture), folder)
        tensors = load_file(folder / "model.safetensors")
        table = tensors[name] if how in ("two", "equal") else tensors.pop(name)
        if how != "neither":
            noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
            tensors["lm_head.weight"] = table + (0.3 * table.std() * noise if how == "two" else 0.0)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@torch.no_grad()
def logits(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()(input_ids=IDS[None]).logits


@torch.no_grad()
def walked(walker):
    """Logits of the model run block by block."""
    probe(walker, IDS, [])
    hidden = walker.embed(IDS)
    for index in range(len(walker.blocks)):
        with walker.block(index) as module:
            hidden = walker.run(index, module, hidden)
    return walker.logits(IDS, hidden)


@pytest.mark.parametrize("architecture", EMBEDDINGS)
@pytest.mark.parametrize("how", ["two", "equal", "head"])
def test_the_walker_runs_the_model_that_transformers_loads(stored, how, architecture):
    folder = stored(how, architecture)
    skeleton, reader = open_skeleton(folder)
    walker = BlockWalker(skeleton, reader, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(walked(walker), logits(folder), rtol=1e-5, atol=1e-5)
    head, embeddings = skeleton.get_output_embeddings().weight, skeleton.get_input_embeddings().weight
    assert (head is embeddings) is (how != "two")  # an equal copy takes no memory
    assert walker.untied == (["lm_head.weight"] if how == "two" else [])


def test_the_teacher_is_the_model_that_transformers_loads(stored):
    folder = stored("two")
    teacher = walked(open_teacher(str(folder), torch.device("cpu")))
    torch.testing.assert_close(teacher, logits(folder), rtol=1e-5, atol=1e-5)


def test_a_pair_of_which_nothing_is_stored_is_named(stored, tmp_path):
    with pytest.raises(InputError, match=r"the checkpoint has no tensor model\.embed_tokens\.weight and 1 more"):
        compress_tiny(stored("neither"), tmp_path / "out")


class Lines(Reporter):
    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, message):
        self.lines.append(message)


def perplexity_said(model, output, **recipe):
    """Held-out perplexity that compress prints, and all lines."""
    reporter = Lines()
    calibration = {"source": "python-docs", "samples": 4, "seqlen": 64}
    data = {"model": str(model), "method": "lord", "ratio": 0.2, "calibration": calibration, **recipe}
    compress(make_recipe({**data, "output": str(output)}), reporter=reporter)
    found = [re.search(r"perplexity (\S+), dense (\S+) ", line) for line in reporter.lines]
    return next((float(one[1]), float(one[2])) for one in found if one), reporter.lines


@torch.no_grad()
def perplexity(folder):
    """Of the model that transformers loads, on the same held-out windows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = calibration_blocks([(parse_source("python-docs"), 4, 64)], tokenizer, 0, folder).held_out
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [nn.functional.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:]) for w in windows]
    return math.exp(float(torch.stack(losses).mean()))


@pytest.mark.parametrize("how", ["two", "head"])
@pytest.mark.parametrize("method", ["lord", "auto"])
def test_the_perplexities_that_are_said_are_those_of_the_files(stored, tmp_path, how, method):
    folder = stored(how)
    (found, dense), lines = perplexity_said(folder, tmp_path / "out", method=method)
    assert dense == pytest.approx(perplexity(folder), rel=1e-3)
    assert found == pytest.approx(perplexity(tmp_path / "out"), rel=1e-3)
    said = any("lm_head.weight is no copy of the tensor that the config ties it to" in line for line in lines)
    assert said is (how == "two")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is (how != "two")


def test_a_head_of_its_own_may_be_a_target(stored, tmp_path):
    compress_tiny(stored("two"), tmp_path / "out", target=["lm_head"])
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].numel() == 0
    assert torch.isfinite(logits(tmp_path / "out")).all()
    with pytest.raises(InputError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        compress_tiny(stored("head"), tmp_path / "tied", target=["lm_head"])


def test_a_base_may_store_a_pair_under_its_other_name(make_model, stored, tmp_path):
    """The tensor is compared all the same."""
    dense, recipe = make_model("qwen3"), {"method": "eora", "ratio": 0.3}
    base = compress_tiny(stored("head"), tmp_path / "base", ratio=0.5).folder
    compress_tiny(dense, tmp_path / "out", **recipe, base=str(base))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] *= 1.5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"differ in model\.embed_tokens\.weight"):
        compress_tiny(dense, tmp_path / "other", **recipe, base=str(base))
