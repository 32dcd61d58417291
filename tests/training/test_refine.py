"""`compress --refine`: labelled, resumable, never worse, off by default."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lrcompress.calibration.corpus import Source
from lrcompress.errors import InputError
from lrcompress.pipeline import compress
from lrcompress.recipe import make_recipe
from lrcompress.training import improve, refine
from lrcompress.training.rows import gather
from lrcompress.training.settings import Settings
from tests.checkpoint.test_loading import load
from tests.conftest import compress_tiny

MINUTES = 0.04
ENOUGH = 0.15
"""Minutes after which a tiny model is better on a busy machine too."""


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(llama, corpus, tokenizer, once):
    """The tiny Llama, trained until it has something to teach."""

    def train(folder):
        rows = gather([Source(str(corpus))], 1000, 64, tokenizer, 0, corpus)[0].ids
        model = load(llama)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(120):
            batch = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))[:8]]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return once("trained", train)


@pytest.fixture
def recipe(trained, corpus):
    return {
        "model": str(trained), "method": "lord", "format": "pivoted", "ratio": 0.4, "dtype": "bfloat16",
        "calibration": {"source": str(corpus), "samples": 8, "seqlen": 64},
    }  # fmt: skip


@pytest.fixture
def fast(monkeypatch):
    """A learning rate at which a second is enough for a tiny model."""
    monkeypatch.setattr(refine, "Settings", lambda **kwargs: Settings(**kwargs, lr=3e-3))


def test_a_refined_checkpoint_says_so_and_is_nearer_to_the_dense_model(
    recipe, trained, corpus, tokenizer, tmp_path, fast
):
    compress(make_recipe({**recipe, "output": str(tmp_path / "plain")}))
    result = compress(make_recipe({**recipe, "output": str(tmp_path / "refined"), "refine": ENOUGH}))
    found = json.loads((tmp_path / "refined" / "report.json").read_text())["refined"]
    assert found == result.report["refined"]
    assert found["held_out"]["after"] < found["held_out"]["before"]
    assert found["steps"] > 0
    assert found["minutes"] > 0
    assert f"refined | {found['train']} trained for" in (tmp_path / "refined" / "README.md").read_text()
    assert "refine: 0.15" in (tmp_path / "refined" / "recipe.yaml").read_text()
    assert "refined" not in json.loads((tmp_path / "plain" / "report.json").read_text())
    plain, refined = tensors(tmp_path / "plain"), tensors(tmp_path / "refined")
    assert {k: (t.shape, t.dtype) for k, t in plain.items()} == {k: (t.shape, t.dtype) for k, t in refined.items()}
    moved = {name for name in plain if not torch.equal(plain[name], refined[name])}
    assert moved
    assert all(".pivot." in name or ".rest." in name for name in moved)
    ids = gather([Source(str(corpus))], 4, 64, tokenizer, 0, corpus)[1].ids
    with torch.no_grad():
        dense, *others = (
            load(folder, dtype=torch.float32)(ids).logits.log_softmax(-1)
            for folder in (trained, tmp_path / "plain", tmp_path / "refined")
        )
    before, after = (float((dense.exp() * (dense - other)).sum()) for other in others)
    assert after < before


def test_an_interruption_while_the_files_change_does_no_harm(recipe, tmp_path, monkeypatch, fast):
    """Stopped after the files were replaced: the resumed run knows what they held and what they are to hold."""
    replace, calls = improve.replace_tensors, []

    def stop(folder, values):
        calls.append(values)
        replace(folder, values)
        raise KeyboardInterrupt

    full = make_recipe({**recipe, "output": str(tmp_path / "out"), "refine": ENOUGH})
    with monkeypatch.context() as patch:
        patch.setattr(improve, "replace_tensors", stop)
        with pytest.raises(BaseException, match="interrupted"):
            compress(full)
    assert len(calls) == 1
    result = compress(full, resume=True)
    stored = tensors(tmp_path / "out")
    assert all(torch.equal(stored[name], tensor) for name, tensor in calls[0].items())
    assert result.report["refined"]["kept"]


def test_a_refinement_that_does_not_help_is_undone(recipe, tmp_path, monkeypatch, fast):
    """What looked better while it was trained is worse once it is loaded again."""
    monkeypatch.setattr(improve, "_measured", lambda *_: 1e9)
    compress(make_recipe({**recipe, "output": str(tmp_path / "plain")}))
    result = compress(make_recipe({**recipe, "output": str(tmp_path / "refined"), "refine": MINUTES}))
    assert result.report["refined"]["kept"] is False
    plain, refined = tensors(tmp_path / "plain"), tensors(tmp_path / "refined")
    assert all(torch.equal(plain[name], tensor) for name, tensor in refined.items())
    assert any("did not lower" in warning for warning in result.report["warnings"])


def test_a_method_that_reads_no_text_is_refined_on_it_too(llama, tmp_path, fast):
    result = compress_tiny(llama, tmp_path / "out", method={"name": "lord", "metric": "plain"}, refine=MINUTES)
    assert result.report["refined"]["rows"]["train"] == 4


def test_no_minutes_are_refused(recipe):
    for minutes in (0, -1, float("nan")):
        with pytest.raises(InputError, match="refine"):
            make_recipe({**recipe, "refine": minutes})
