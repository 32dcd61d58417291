"""The sensitivity allocator: its measured divergences against whole models with one weight replaced."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrcompress.model.surgery import dense_parts
from lrcompress.pipeline import compress, profile_model
from lrcompress.report.progress import Reporter
from lrcompress.stages import sensitivity
from lrcompress.stages.allocate import allocate
from lrcompress.stages.encode import encode_site
from lrcompress.stages.opening import open_request
from lrcompress.stages.request import check_request
from tests.conftest import compress_tiny
from tests.test_pipeline import recipe


def profiled(folder, scratch, **changes):
    quiet = Reporter(quiet=True)
    opened = open_request(check_request(recipe(folder, **changes)), quiet)
    return opened, profile_model(opened, scratch, quiet)


@pytest.mark.parametrize("method", ["lord", "auto"])
def test_a_divergence_is_that_of_the_model_with_this_weight_cut(make_model, tmp_path, method):
    folder = make_model("llama")
    opened, artefacts = profiled(folder, tmp_path, method=method, allocator="sensitivity")
    ids = opened.calibration.ids[: sensitivity.SAMPLES]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def predictions():
        with torch.no_grad():
            return model(input_ids=ids).logits[:, sensitivity.SKIPPED :].double().log_softmax(-1)

    dense = predictions()
    for site in [opened.sites[0], opened.sites_of(1)[4], opened.sites[-1]]:
        curve, artefact = opened.request.method.curve(site, opened.dtype.itemsize), artefacts.load(site)
        level = sensitivity.cut_level(opened.request.method, curve)
        kept = {"lord": 0.5, "auto": 0.125}[method]
        assert abs(int(curve.bytes[level]) - kept * curve.dense_bytes) < 0.15 * curve.dense_bytes
        spec = opened.request.method.spec(site, int(curve.ranks[level]), opened.dtype.itemsize)
        error = float(artefact["errors"][level])
        tensors = encode_site(opened, site, spec, artefact)
        layer = model.get_submodule(site.name)
        with sensitivity.installed(opened, {site.name: (sensitivity.as_encoded(spec, tensors), tensors)}):
            cut, bias = dense_parts(opened.walker.model.get_submodule(site.name))
        before = layer.weight.data.clone(), layer.bias
        layer.weight.data = cut.float()
        layer.bias = None if bias is None else torch.nn.Parameter(bias.float())
        expected = (dense.exp() * (dense - predictions())).sum(-1).mean() / error
        layer.weight.data, layer.bias = before
        assert artefacts.sensitivities[site.name] == pytest.approx(float(expected), rel=2e-3)


def test_a_weight_that_the_model_feels_twice_as_much_is_given_more(llama, tmp_path):
    opened, artefacts = profiled(llama, tmp_path, method="lord", allocator="sensitivity", ratio=0.4)
    name = opened.sites[0].name
    known = artefacts.sensitivities
    kept = []
    for factor in (0.5, 1.0, 4.0, 1e6):
        artefacts.sensitivity_path.write_text(json.dumps({**known, name: factor * known[name]}))
        plan = allocate(opened, artefacts)
        assert sum(plan.bytes.values()) <= 0.6 * sum(plan.dense_bytes.values())
        kept.append(plan.bytes[name])
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] == plan.dense_bytes[name]


def test_it_is_measured_once_and_resumed_to_the_same_bytes(llama, tmp_path, monkeypatch):
    whole = compress_tiny(llama, tmp_path / "whole", method="lord", allocator="sensitivity", ratio=0.3)
    assert whole.report["ratio"]["stored"] >= 0.3
    monkeypatch.setattr("lrcompress.pipeline.store", _dies)
    with pytest.raises(KeyError):
        compress_tiny(llama, tmp_path / "cut", method="lord", allocator="sensitivity", ratio=0.3)
    monkeypatch.undo()
    monkeypatch.setattr(sensitivity, "_divergences", _dies)
    again = recipe(llama, method="lord", allocator="sensitivity", ratio=0.3, output=str(tmp_path / "cut"))
    compress(again, resume=True)
    for file in whole.folder.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()


def _dies(*_, **__):
    raise KeyError("the test stops here")


def test_weights_whose_cut_says_nothing_get_the_median_of_their_kind(make_model, tmp_path):
    """Of rank 4 in float32, a cut to half the bytes loses rounding alone; of experts, some see no token."""
    _, artefacts = profiled(make_model("llama", rank=4), tmp_path / "low", method="lord", allocator="sensitivity")
    assert set(artefacts.sensitivities.values()) == {1.0}
    _, artefacts = profiled(make_model("qwen3_moe"), tmp_path / "moe", method="lord", allocator="sensitivity")
    assert all(value > 0 for value in artefacts.sensitivities.values())


def test_the_median_stands_in_for_a_weight_without_effect(llama, tmp_path):
    opened, artefacts = profiled(llama, tmp_path, method="lord", allocator="sensitivity")
    known = artefacts.sensitivities
    errors = dict.fromkeys(known, 1.0)
    kind = [site.name for site in opened.sites if site.name.endswith("q_proj")]
    divergences = {name: 2.0 if name in kind[:2] else 5.0 for name in known} | {kind[2]: 0.0}
    scales = sensitivity._scales(opened, artefacts, divergences, errors)
    assert scales[kind[2]] == 2.0
    assert scales[kind[0]] == 2.0
    assert all(scales[name] == 5.0 for name in known if name not in kind)
