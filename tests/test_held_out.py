"""The held-out perplexity that compress prints, against the model that transformers loads from what was written."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.architectures import configs
from tests.test_tied import perplexity, perplexity_said

CASES = {
    "the blocks": {},
    "the output head": {"target": ["lm_head", "model.layers.*"], "ratio": 0.4},
    "the output head alone": {"target": ["lm_head"], "ratio": 0.5},
    "a head with a bias": {"target": ["lm_head"], "ratio": 0.5, "method": {"name": "lord", "metric": "centred"}},
    "the head by gradients": {"target": ["lm_head", "model.layers.*"], "ratio": 0.9, "method": "auto"},
    "the head in sequence": {"target": ["lm_head", "model.layers.*"], "method": {"name": "lord", "propagation": "sequential"}},
    "another dtype": {"dtype": "bfloat16"},
    "half precision": {"dtype": "float16", "target": ["lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_printed_is_measured_on_what_is_stored(llama, tmp_path, case):
    (found, dense), _ = perplexity_said(llama, tmp_path / "out", **CASES[case])
    assert dense == pytest.approx(perplexity(llama), rel=1e-3)
    assert found == pytest.approx(perplexity(tmp_path / "out"), rel=1e-3)
    assert abs(found / dense - 1) > 2e-3


def test_layers_before_the_blocks_count_too(tokenizer, tmp_path):
    """OPT's project_in makes embeddings of another width hidden states, project_out comes after the blocks."""
    config = copy.deepcopy(configs()["opt"])
    config.word_embed_proj_dim = 24
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = {"target": ["*project_in", "*project_out"], "ratio": 0.8, "method": {"name": "lord", "metric": "input"}}
    (found, dense), _ = perplexity_said(tmp_path / "model", tmp_path / "out", **recipe)
    assert dense == pytest.approx(perplexity(tmp_path / "model"), rel=1e-3)
    assert found == pytest.approx(perplexity(tmp_path / "out"), rel=1e-3)
    assert abs(found / dense - 1) > 2e-3
