"""Sequential propagation: a block's statistics are of what the compressed blocks before it give."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrcompress.calibration.collect import InputCollector, token_weights
from lrcompress.errors import InputError, Interrupted
from lrcompress.model.surgery import dense_parts
from lrcompress.pipeline import compress
from lrcompress.report.progress import Reporter
from lrcompress.stages.prepare import check_request, open_request
from lrcompress.stages.profile import Artefacts
from tests.conftest import compress_tiny
from tests.test_pipeline import recipe

SEQUENTIAL = {"method": {"name": "eora", "propagation": "sequential"}, "base": "rtn:2:16", "rank": 2, "ratio": None}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_errors_are_those_on_the_compressed_prefix(make_model, tmp_path, architecture):
    """The reported error of the first layers of the last block against hooks on the finished checkpoint."""
    result = compress_tiny(make_model(architecture), tmp_path / "out", **SEQUENTIAL)
    opened = open_request(check_request(recipe(make_model(architecture), **SEQUENTIAL)), Reporter(quiet=True))
    ids = opened.calibration.ids
    model = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(make_model(architecture), dtype=torch.float32)
    site = opened.sites_of(2)[0]
    assert site.kind.endswith(("q_proj", "c_attn"))
    with torch.no_grad(), InputCollector(model, [site], token_weights(ids.shape[1], 0.125)) as collector:
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    gram = collector.statistics[site.name].gram()
    weight = dense.get_submodule(site.name).weight.detach()
    weight = (weight.T if site.conv1d else weight).double()
    error = weight - dense_parts(model.get_submodule(site.name))[0].double()
    expected = float((((error @ gram) * error).sum() / ((weight @ gram) * weight).sum()).sqrt())
    reported = {t["name"]: t["relative_error"] for t in result.report["targets"]}[site.name]
    assert reported == pytest.approx(expected, rel=1e-3)
    one_pass = {**SEQUENTIAL, "method": "eora"}
    other = compress_tiny(make_model(architecture), tmp_path / "other", **one_pass).report["targets"]
    first = {t["name"]: t["relative_error"] for t in other}
    same = {t["name"]: t["relative_error"] == first[t["name"]] for t in result.report["targets"]}
    assert all(equal is (site.block == 0) for site in opened.sites for equal in [same[site.name]])


def test_the_uniform_allocator_serves_every_method(llama, tmp_path):
    method = {"name": "lord", "propagation": "sequential"}
    report = compress_tiny(llama, tmp_path / "out", method=method, ratio=0.4).report
    assert 0.4 <= report["ratio"]["stored"] <= 0.42


def test_interrupted_and_resumed_gives_the_same_bytes(llama, tmp_path, monkeypatch):
    whole = compress_tiny(llama, tmp_path / "whole", **SEQUENTIAL)
    save = Artefacts.save

    def interrupted(self, block, artefacts):
        if block == 1:
            raise KeyboardInterrupt
        save(self, block, artefacts)

    changes = {**SEQUENTIAL, "output": str(tmp_path / "out")}
    monkeypatch.setattr(Artefacts, "save", interrupted)
    with pytest.raises(Interrupted):
        compress(recipe(llama, **changes))
    monkeypatch.setattr(Artefacts, "save", save)
    compress(recipe(llama, **changes), resume=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_levels_must_be_known_beforehand(llama, tmp_path):
    for changes in ({"method": {"name": "eora", "propagation": "sequential"}},
                    {"method": {"name": "welore", "propagation": "sequential"}}):  # fmt: skip
        with pytest.raises(InputError, match="--allocator uniform"):
            compress_tiny(llama, tmp_path / "out", **changes)
