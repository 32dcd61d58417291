"""The block-by-block backward pass against autograd on the whole model."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lrcompress.calibration.collect import InputCollector, token_weights
from lrcompress.calibration.gradients import GradientCollector, backward_block, loss_gradients
from lrcompress.errors import InputError
from lrcompress.protocols import Site
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import HiddenWalk
from lrcompress.stages.request import check_request
from tests.conftest import ARCHITECTURES, compress_tiny


def walked(model, folder, **changes):
    """A model opened for gradients, and the hidden states before and after every block."""
    data = {"model": str(model), "method": {"name": "lord", "metric": "two_sided"}, "ratio": 0.3, **changes}
    opened = open_request(check_request(make_recipe(data)), Reporter(quiet=True))
    walk = HiddenWalk(opened, folder)
    walk.start(0)
    for block in range(len(opened.blocks)):
        with opened.walker.block(block) as module:
            walk.step(block, module, [], lambda: None)
    return opened, walk


def test_a_layer_that_nothing_is_differentiated_through_has_no_gradient():
    """DeepSeek's indexer chooses tokens under no_grad."""

    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.index, self.layer = nn.Linear(4, 3), nn.Linear(4, 5)

        def forward(self, x):
            with torch.no_grad():
                chosen = self.index(x).argmax()
            return self.layer(x) * chosen

    model = Chooses().requires_grad_(False)
    sites = [Site("index", (3, 4), 0, "index", True), Site("layer", (5, 4), 0, "layer", True)]
    with GradientCollector(model, sites, gram=True) as collector:
        model(torch.randn(6, 4, requires_grad=True)).sum().backward()
    moments = collector.moments(torch.device("cpu"))
    assert not moments["index"].any()
    assert moments["index"].shape == (3, 3)


def test_a_layer_before_the_blocks_has_no_gradient_that_is_known():
    layer = nn.Linear(4, 3).requires_grad_(False)
    site = Site("0", (3, 4), 0, "0", True)
    with (
        GradientCollector(nn.Sequential(layer), [site], gram=True, whole=False),
        pytest.raises(InputError, match="before"),
    ):
        layer(torch.ones(2, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("chunk", "gram"), [(7, True), (1000, True), (1000, False)])
def test_streamed_gradients_equal_autograd(make_model, tmp_path, monkeypatch, architecture, chunk, gram):
    monkeypatch.setattr("lrcompress.calibration.gradients.CHUNK", chunk)
    calibration = {"source": "python-docs", "samples": 3, "seqlen": 32}
    opened, walk = walked(make_model(architecture), tmp_path / "hidden", calibration=calibration)
    blocks = len(opened.blocks)
    ids = opened.calibration.ids
    last, out = walk.calibration(blocks), walk.gradients(walk.gradient_path(blocks))
    loss_gradients(opened.walker, ids, last, out, [], gram=gram)
    streamed = {}
    for block in reversed(range(blocks)):
        with opened.walker.block(block) as module:
            streamed |= backward_block(
                opened.walker,
                block,
                module,
                walk.calibration(block),
                walk.gradients(walk.gradient_path(block + 1)),
                walk.gradients(walk.gradient_path(block)),
                opened.sites_of(block),
                walk.weights,
                lambda: None,
                gram=gram,
            )
    model = AutoModelForCausalLM.from_pretrained(make_model(architecture), dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    weights = token_weights(ids.shape[1], 0.125)
    inputs, gradients = InputCollector(model, opened.sites, weights), GradientCollector(model, opened.sites, gram=True)
    with inputs, gradients:
        for row in ids:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
    assert streamed.keys() == {site.name for site in opened.sites}
    moments = gradients.moments(torch.device("cpu"))
    for site in opened.sites:
        expected = moments[site.name]
        assert expected.abs().max() > 0
        expected = expected if gram else expected.diagonal()
        torch.testing.assert_close(
            streamed[site.name].gradients, expected, rtol=1e-3, atol=1e-5 * float(expected.max())
        )
        torch.testing.assert_close(
            streamed[site.name].second, inputs.statistics[site.group].second, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("metric", ["trace", "two_sided"])
def test_compressing_with_gradients(llama, tmp_path, metric):
    method = {"name": "lord", "metric": metric}
    result = compress_tiny(llama, tmp_path / "out", method=method, target=["*.mlp.*", "lm_head"])
    assert result.report["metric"] == metric
    assert result.report["ratio"]["stored"] >= 0.2
    assert all(t["relative_error"] > 0 for t in result.report["targets"])


def test_a_backward_run_resumes(llama, tmp_path, monkeypatch):
    """Interrupted in the backward pass, continued, the same bytes."""
    method = {"name": "lord", "metric": "two_sided"}
    whole = compress_tiny(llama, tmp_path / "whole", method=method)
    from lrcompress.errors import Interrupted
    from lrcompress.pipeline import compress
    from lrcompress.stages import backward

    real, seen = backward.decompose_block, []

    def stop_at_the_second(*args):
        seen.append(args[1])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(backward, "decompose_block", stop_at_the_second)
    with pytest.raises(Interrupted):
        compress_tiny(llama, tmp_path / "out", method=method)
    monkeypatch.setattr(backward, "decompose_block", real)
    recipe = make_recipe({**whole.report["recipe"], "output": str(tmp_path / "out")})
    assert (tmp_path / "out.partial").exists()
    result = compress(recipe, resume=True)
    first, second = (f / "model.safetensors" for f in (whole.folder, result.folder))
    assert first.read_bytes() == second.read_bytes()


def test_drawn_labels_give_the_fisher_information(make_model, tmp_path):
    """At the logits it is diag(p) - p pᵀ; the text's own labels, never drawn, give something else."""
    data = {"method": {"name": "lord", "metric": "two_sided", "labels": "sampled"}, "target": ["lm_head"]}
    calibration = {"source": "python-docs", "samples": 2, "seqlen": 16}
    opened, walk = walked(make_model("llama"), tmp_path / "hidden", calibration=calibration, **data)
    blocks = len(opened.blocks)
    ids, last = opened.calibration.ids, walk.calibration(blocks)
    out = walk.gradients(walk.gradient_path(blocks))

    def moment(seed):
        found = loss_gradients(opened.walker, ids, last, out, opened.sites, gram=True, sample_seed=seed)
        return found["lm_head"]

    drawn = torch.stack([moment(100 * seed) for seed in range(300)]).mean(0)
    expected = torch.zeros_like(drawn)
    for sample, row in enumerate(ids):
        hidden = last.read(sample)[:, :-1]
        for p in opened.walker.logits(row[:-1], hidden)[0].double().softmax(-1).detach():
            expected += (p.diag() - torch.outer(p, p)) / (len(ids) * (len(row) - 1))
    assert float((drawn - expected).norm() / expected.norm()) < 0.25  # (320 tokens / 9000 draws) ** 0.5 = 0.19
    assert float((moment(None) - expected).norm() / expected.norm()) > 1
    assert torch.equal(moment(7), moment(7))


def test_labels_without_gradients_are_refused(make_model):
    data = {"method": {"name": "lord", "labels": "sampled"}, "ratio": 0.3}
    with pytest.raises(InputError, match="labels=sampled"):
        check_request(make_recipe({"model": str(make_model("llama")), **data}))
