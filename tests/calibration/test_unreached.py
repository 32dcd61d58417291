"""Layers that no gradient reaches: DeepSeek-V3.2's indexer, which chooses tokens without a gradient, and others."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV32Config

from lrcompress.calibration.gradients import GradientCollector
from lrcompress.calibration.unreached import with_shares
from lrcompress.errors import Interrupted
from lrcompress.pipeline import compress
from lrcompress.protocols import InputStatistics, Site
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from tests.architectures import configs

INDEXER = ("indexer.wq_b", "indexer.wk", "indexer.weights_proj")


@pytest.fixture(scope="module")
def chooser(tokenizer, tmp_path_factory):
    """A tiny DeepSeek-V3.2 without experts, whose indexer lets every token attend to 8 others."""
    shared = configs()["deepseek_v3"].to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
            "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    torch.manual_seed(0)
    config = DeepseekV32Config(
        **{key: shared[key] for key in keys}, num_hidden_layers=2, first_k_dense_replace=2, index_topk=8,
        index_head_dim=16, index_n_heads=4, mlp_layer_types=["dense", "dense"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("chooser")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compressed(model, output, method, **recipe):
    """The report, and the warnings."""
    reporter = Reporter(quiet=True)
    calibration = {"source": "python-docs", "samples": 4, "seqlen": 64}
    data = {"model": str(model), "method": method, "ratio": 0.3, "calibration": calibration, "output": str(output)}
    return compress(make_recipe({**data, **recipe}), reporter=reporter).report, reporter.warnings


METHODS = [
    "auto",
    {"name": "auto", "metric": "trace"},
    {"name": "lord", "metric": "two_sided", "propagation": "sequential"},
    {"name": "cospadi", "metric": "two_sided", "coupled_rounds": 0},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_chooses_tokens_is_compressed_like_the_rest(chooser, tmp_path, method):
    recipe = {} if method == "auto" else {"allocator": "marginal_error"}
    report, warnings = compressed(chooser, tmp_path / "out", method, **recipe)
    named = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in INDEXER]
    told = next(warning for warning in warnings if "no gradient of the loss reaches" in warning)
    assert all(name in told for name in named)
    assert told in report["warnings"]
    targets = {target["name"]: target for target in report["targets"]}
    kept = {name: target["bytes"] / target["dense_bytes"] for name, target in targets.items()}
    others = [kept[name] for name in kept if "indexer" not in name]
    assert all(kept[name] > min(0.3, min(others)) for name in named if "weights_proj" not in name)
    assert all(targets[name]["relative_error"] > 0 for name in named if targets[name]["format"] != "dense")


def test_the_same_after_an_interruption(chooser, tmp_path, monkeypatch):
    """The warning is made of what lies in the scratch folder."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    model = str(chooser)
    data = {"model": model, "method": "auto", "ratio": 0.3, "output": str(tmp_path / "out"),
            "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64}}  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("lrcompress.pipeline.store", stop)
        with pytest.raises(Interrupted):
            compress(make_recipe(data))
    reporter = Reporter(quiet=True)
    report = compress(make_recipe(data), resume=True, reporter=reporter).report
    assert any("no gradient of the loss reaches" in warning for warning in report["warnings"])


class Block(nn.Module):
    """What `used` gives, times the places where `chosen` and `shut` are largest: no gradient comes to these."""

    def __init__(self):
        super().__init__()
        self.used, self.chosen = nn.Linear(4, 6), nn.Linear(4, 5)
        self.shut = nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            shut = self.shut(x)
        return self.used(x) * (1 + self.chosen(x).argmax(-1, keepdim=True) + shut.argmax(-1, keepdim=True))


@pytest.mark.parametrize("gram", [True, False])
def test_rows_without_a_gradient_are_counted(gram):
    """Whether autograd is off, or its graph ends at a choice: neither is a layer that no token came to."""
    torch.manual_seed(0)
    block, sites = (
        Block(),
        [Site(name, (out, 4), 0, name, True) for name, out in (("used", 6), ("chosen", 5), ("shut", 3))],
    )
    x = torch.randn(1, 7, 4, requires_grad=True)
    with GradientCollector(block, sites, gram=gram) as collector:
        output = block(x)
        output.backward(torch.ones_like(output))
    found = collector.moments(torch.device("cpu"))
    assert set(found) == {"used", "chosen", "shut"}
    assert (found["chosen"] == 0).all()
    assert (found["shut"] == 0).all()
    assert (found["used"] > 0).all()


def statistics(generator, out, width, *, gram, reached=True, by_outputs=False, weight=None, share=1.0):
    rows = torch.randn(50, width, generator=generator)
    one = InputStatistics.zeros(width, outputs=out if by_outputs else None)
    one.update(rows, outputs=rows.double() @ weight.T if by_outputs else None)
    gradients = torch.randn(50, out, generator=generator).double() * (1.0 if reached else 0.0)
    one.gradients = gradients.T @ gradients / 50 if gram else gradients.square().mean(0)
    one.share = share
    return one, rows.double(), gradients


@pytest.mark.parametrize("by_outputs", [False, True])
@pytest.mark.parametrize("gram", [True, False])
def test_the_share_of_the_energy(gram, by_outputs):
    """Against the mean over all rows x and gradients g of (gᵀ W x)², or of its diagonal part, written out."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (6, 4), "b": (3, 8), "expert": (5, 4), "chooser": (7, 9)}
    weights = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    found, wanted = {}, 0.0
    for name, (out, width) in shapes.items():
        share, reached = (0.25 if name == "expert" else 1.0), name != "chooser"
        found[name], rows, gradients = statistics(
            generator, out, width, gram=gram, reached=reached, by_outputs=by_outputs, weight=weights[name], share=share
        )
        outputs = rows @ weights[name].T
        both = (gradients @ outputs.T).square() if gram else gradients.square() @ outputs.square().T
        wanted += share * float(both.mean())
        if name == "chooser":
            squares = float(outputs.square().sum(1).mean())
    sites = [Site(name, shape, 0, name, False) for name, shape in shapes.items()]
    changed = with_shares(sites, found, lambda site: weights[site.name])
    numbers = sum(math.prod(shapes[name]) for name in ("a", "b", "expert"))
    value = wanted * math.prod(shapes["chooser"]) / numbers / squares
    alike = torch.full((7,), value, dtype=torch.float64)
    torch.testing.assert_close(changed["chooser"].gradients, torch.diag(alike) if gram else alike, rtol=1e-5, atol=0)
    assert [name for name in shapes if not changed[name].reached] == ["chooser"]
    assert all(changed[name] is found[name] for name in ("a", "b", "expert"))


def test_a_block_without_any_gradient_has_nothing_to_share():
    generator = torch.Generator().manual_seed(3)
    one, _, _ = statistics(generator, 6, 4, gram=True, reached=False)
    changed = with_shares([Site("a", (6, 4), 0, "a", False)], {"a": copy.copy(one)}, lambda _: torch.ones(6, 4))
    assert not changed["a"].reached
    assert (changed["a"].gradients == 0).all()
