"""Sequential propagation: a block's statistics are of what the compressed blocks before it give."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrcompress.calibration.collect import InputCollector, token_weights
from lrcompress.errors import InputError, Interrupted
from lrcompress.linalg.whitening import aimed
from lrcompress.model.surgery import dense_parts
from lrcompress.pipeline import compress
from lrcompress.protocols import InputStatistics
from lrcompress.report.progress import Reporter
from lrcompress.stages import propagate
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.request import check_request
from tests.conftest import compress_tiny
from tests.test_pipeline import recipe

SEQUENTIAL = {"method": "eora", "base": "rtn:2:16", "rank": 2, "ratio": None}


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
    one_pass = {**SEQUENTIAL, "method": {"name": "eora", "propagation": "one_pass"}}
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


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ({"name": "auto", "propagation": "sequential", "toward_dense": 0.5}, {"ratio": 0.4}),
        ({"name": "welore", "propagation": "sequential"}, {"ratio": 0.4}),
        ({"name": "eora", "metric": "two_sided", "factor_bits": 8},
         {"ratio": 0.5, "base": "rtn:2:16"}),
    ],
)  # fmt: skip
def test_any_allocator_decides_on_the_dense_models_pass(llama, tmp_path, method, changes):
    """The levels are those of a one-pass run, the weights are not; the asked bytes hold."""
    calm = {k: v for k, v in method.items() if k != "toward_dense"} | {"propagation": "one_pass"}
    once = compress_tiny(llama, tmp_path / "once", method=calm, **changes)
    twice = compress_tiny(llama, tmp_path / "twice", method=method, **changes)
    ranks = [{t["name"]: t["rank"] for t in result.report["targets"]} for result in (once, twice)]
    assert ranks[0] == ranks[1]
    assert twice.report["ratio"]["stored"] >= changes["ratio"]
    files = [(r.folder / "model.safetensors").read_bytes() for r in (once, twice)]
    assert files[0] != files[1]


def test_aiming_at_the_dense_model_is_the_least_squares_solution():
    """share=1: the full-rank weight that reproduces W x from x̂, against torch.linalg.lstsq on the rows themselves."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(200, 8, generator=generator)
    rows = dense @ torch.randn(8, 8, generator=generator) + 0.3 * torch.randn(200, 8, generator=generator)
    weight = torch.randn(5, 8, generator=generator).double()
    statistics = InputStatistics.zeros(8)
    for part, other in zip(rows.split(50), dense.split(50), strict=True):
        statistics.update(part, torch.full((50,), 2.0), other)
    assert statistics.drift is not None
    found = aimed(weight, statistics.gram(), statistics.drift / statistics.count, 1.0, 0.0)
    expected = torch.linalg.lstsq(rows.double(), dense.double() @ weight.T).solution.T
    assert torch.allclose(found, expected, atol=1e-4)
    half = aimed(weight, statistics.gram(), statistics.drift / statistics.count, 0.5, 0.0)
    assert torch.allclose(half, (weight + found) / 2, atol=1e-9)


def test_toward_dense_needs_sequential_propagation(llama, tmp_path):
    with pytest.raises(InputError, match="propagation=sequential"):
        compress_tiny(llama, tmp_path / "out", method={"name": "lord", "toward_dense": 0.5})


def test_the_output_head_is_propagated_to_as_well(make_model, tmp_path):
    changes = {"target": ["lm_head", "*.2.mlp.*"], "ratio": 0.3}
    method = {"name": "auto", "propagation": "sequential", "toward_dense": 1.0}
    result = compress_tiny(make_model("llama"), tmp_path / "out", method=method, format="auto", **changes)
    assert {t["format"] for t in result.report["targets"]} <= {"sparse_dictionary", "dense"}


@pytest.mark.parametrize("toward_dense", [0.0, 0.5])
def test_finished_blocks_are_not_decomposed_again(llama, tmp_path, monkeypatch, toward_dense):
    changes = {"method": {"name": "lord", "propagation": "sequential", "toward_dense": toward_dense}, "ratio": 0.2}
    whole = compress_tiny(llama, tmp_path / "whole", **changes)
    done, real = [], propagate.decompose_block

    def decompose(opened, block, statistics, reporter, ranks):
        if block == 2 and len(done) == 2:
            raise KeyError("interrupted")
        done.append(block)
        return real(opened, block, statistics, reporter, ranks)

    monkeypatch.setattr(propagate, "decompose_block", decompose)
    with pytest.raises(KeyError):
        compress_tiny(llama, tmp_path / "out", **changes)
    done.append(-1)
    made = recipe(llama, output=str(tmp_path / "out"), **changes)
    compress(made, resume=True)
    assert done == [0, 1, -1, 2]
    for path in whole.folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_weights_that_the_loss_does_not_feel_cost_nothing(llama, tmp_path):
    """A block whose two output weights are zero, as LLaMA-Pro puts in: nothing in it is worth a byte."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers.1." in name and ("o_proj" in name or "down_proj" in name):
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = compress_tiny(folder, tmp_path / "out", method="auto", ratio=0.3).report
    dead = [
        t for t in report["targets"] if "layers.1." in t["name"] and not t["name"].endswith(("o_proj", "down_proj"))
    ]
    assert sum(t["bytes"] for t in dead) < 0.2 * sum(t["dense_bytes"] for t in dead)
