"""Inputs that nobody means to give: one clear error each, or a right result; nothing that was there is lost."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lrcompress.budget import parse_size
from lrcompress.calibration.corpus import shares
from lrcompress.checkpoint.cache import content_digest
from lrcompress.errors import InputError, Interrupted, ResourceError
from lrcompress.foreign.opening import check_model
from lrcompress.model.device import resolve_device
from lrcompress.pipeline import compress
from lrcompress.recipe import load_recipe, make_recipe, split_assignment
from lrcompress.stages.naming import output_folder
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.workspace import MARKER, REPLACED, files_identity
from tests.conftest import compress_tiny
from tests.test_faults import copied, failing, recipe

SHORT = {"source": "python-docs", "samples": 2, "seqlen": 32}


def scaled(model, folder, name, factor):
    """A copy of the model with one tensor multiplied."""
    copied(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: weights[name] * factor}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_what_stays_dense_must_fit_into_the_dtype_to_write(llama, tmp_path, name):
    model = scaled(llama, tmp_path / "model", name, 1e7)
    with pytest.raises(InputError, match=rf"{name} does not fit into torch\.float16"):
        compress_tiny(model, tmp_path / "out", dtype="float16", ignore=["*q_proj"], calibration=SHORT)
    assert not list(tmp_path.glob("out*"))


def killed_between_renames(output):
    """What a run with --overwrite leaves that was killed when the old folder had gone and the new one had not come."""
    partial = output.with_name("out.partial")
    (partial / REPLACED).mkdir(parents=True)
    (partial / MARKER).touch()
    (partial / REPLACED / "mine").write_text("precious")


def test_the_folder_that_a_killed_run_was_replacing_comes_back(llama, tmp_path):
    killed_between_renames(tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        compress(recipe(llama, tmp_path / "out", "lord"))
    assert (tmp_path / "out/mine").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    killed_between_renames(tmp_path / "other/out")
    long = {"source": "python-docs", "samples": 10**6, "seqlen": 64}
    with pytest.raises(InputError, match="too short"):
        compress(make_recipe({"model": str(llama), "method": "lord", "ratio": 0.3, "calibration": long,
                              "output": str(tmp_path / "other/out")}), overwrite=True)  # fmt: skip
    assert (tmp_path / "other/out/mine").read_text() == "precious"


def test_a_finished_result_that_cannot_be_moved_into_place_stays(llama, tmp_path, monkeypatch):
    made = recipe(llama, tmp_path / "out", "lord")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    rename = Path.rename

    def refused(self, target):
        if self.name == "out.partial":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(ResourceError, match="finished in .*out.partial but cannot be moved"):
            compress(made, overwrite=True)
    assert (tmp_path / "out/mine").read_text() == "precious"
    compress(made, overwrite=True, resume=True)
    assert (tmp_path / "out/report.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_output_that_is_a_link_is_written_where_it_leads(llama, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    compress_tiny(llama, tmp_path / "out", calibration=SHORT)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere/report.json").exists()


@pytest.mark.parametrize("name", [".", "/", "x" * 300, "x" * 250, "~no-such-user/out", "a\0b"])
def test_an_output_that_no_folder_can_be_called(llama, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="output"):
        compress(make_recipe({"model": str(llama), "method": "lord", "ratio": 0.3, "output": name}))
    assert not list(tmp_path.iterdir())


def test_files_in_the_way_of_the_partial_folder(llama, tmp_path):
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(InputError, match="is in the way"):
        compress_tiny(llama, tmp_path / "out")
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / MARKER).touch()
    (tmp_path / "out.partial/scratch").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        compress(recipe(llama, tmp_path / "out", "lord"), resume=True)


def test_what_is_no_file_in_a_models_folder_is_no_part_of_it(llama, tmp_path):
    """A pipe, of all things, would be read for ever."""
    model = copied(llama, tmp_path / "model")
    before = files_identity(model), content_digest(model)
    (model / "sub.json").mkdir()
    (model / "notes.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(model / "pipe.txt")
    assert (files_identity(model), content_digest(model)) == before
    compress_tiny(model, tmp_path / "out", calibration=SHORT)


def test_an_adapter_beside_the_weights_is_refused(llama, tmp_path):
    model = copied(llama, tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter beside its weights"):
        compress_tiny(model, tmp_path / "out", calibration=SHORT)


def test_tensors_that_the_model_has_no_place_for_are_named_and_not_counted(llama, tmp_path):
    model = copied(llama, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "extra": torch.ones(10**6)}, model / "model.safetensors", metadata={"format": "pt"})
    plain = compress_tiny(llama, tmp_path / "plain", calibration=SHORT).report
    report = compress_tiny(model, tmp_path / "out", calibration=SHORT).report
    assert report["ratio"] == plain["ratio"]
    assert any(
        "1 tensors of the checkpoint, 4.0 MB" in warning and "extra" in warning for warning in report["warnings"]
    )
    fewer = copied(llama, tmp_path / "fewer")
    config = json.loads((fewer / "config.json").read_text())
    (fewer / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    report = compress_tiny(fewer, tmp_path / "short", calibration=SHORT).report
    assert any("model.layers.1." in warning for warning in report["warnings"])


def test_a_tokenizer_that_cannot_read_the_text(llama, tmp_path):
    model = copied(llama, tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "[UNK]"))).save_pretrained(model)
    with pytest.raises(InputError, match="cannot be tokenised"):
        compress_tiny(model, tmp_path / "out", calibration=SHORT)


@pytest.mark.parametrize("line", ['{"text": "\\ud800 and more"}', "[" * 100_000])
def test_json_lines_that_are_no_text(llama, tmp_path, line):
    (tmp_path / "text.jsonl").write_text("\n".join([line] * 3))
    with pytest.raises(InputError, match=r"cannot be (tokenised|read)"):
        compress_tiny(llama, tmp_path / "out", calibration={"source": str(tmp_path / "text.jsonl")})


def test_text_of_its_own_that_a_model_cannot_write(make_model, tmp_path):
    with pytest.raises(InputError, match="cannot write text"):
        compress_tiny(make_model("gpt2"), tmp_path / "out", calibration={"source": "self", "samples": 1, "seqlen": 300})


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 3), ("head_dim", 10**10), ("max_position_embeddings", 10**12), ("num_attention_heads", 10**9)],
)
def test_configs_that_ask_for_the_impossible(llama, tmp_path, key, value):
    model = copied(llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError):
        compress_tiny(model, tmp_path / "out", calibration=SHORT)


def test_numbers_and_names_without_measure(llama, tmp_path):
    asked = {"model": str(llama), "method": "lord", "ratio": 0.3}
    with pytest.raises(InputError, match="size"):
        parse_size("9" * 400)
    with pytest.raises(InputError, match="add up to inf"):
        shares([1e308, 1e308], 4)
    for change in (
        {"seed": 2**70},
        {"seed": -(2**64)},
        {"calibration": {**SHORT, "seqlen": 10**30}},
        {1: 2},
        {None: 2},
    ):
        with pytest.raises(InputError):
            make_recipe({**asked, **change})
    for value in ("2020-13-45", "!!int a", "[" * 2000):
        with pytest.raises(InputError, match="YAML"):
            split_assignment(f"metric={value}")
        (tmp_path / "recipe.yaml").write_text(f"model: {value}")
        with pytest.raises(InputError, match="YAML"):
            load_recipe(str(tmp_path / "recipe.yaml"), [])
    for name in ("~no-such-user/x", "x" * 300, "a\0b"):
        with pytest.raises(InputError, match="no path"):
            check_model(name)
        with pytest.raises(InputError, match="no path"):
            output_folder(make_recipe({**asked, "output": name}))
    with pytest.raises(InputError, match="--device meta"):
        resolve_device("meta")


def test_kept_statistics_that_are_damaged_are_gathered_again(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    first = compress_tiny(llama, tmp_path / "first", calibration=SHORT)
    for damage in (b"", b"\x00" * 100, None):
        (block,) = (tmp_path / "cache/statistics").glob("*/block-00001.safetensors")
        if damage is None:
            save_file({"other": torch.ones(2)}, block)
        else:
            block.write_bytes(damage)
        again = compress_tiny(llama, tmp_path / "again", calibration=SHORT)
        one, two = (load_file(result.folder / "model.safetensors") for result in (first, again))
        assert all(torch.equal(one[name], two[name]) for name in one)
        (tmp_path / "again").rename(tmp_path / f"again-{damage is None}-{len(damage or b'')}")


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("scratch/identity.json", "identity.json is damaged"),
        ("scratch/artefacts/block-00000.safetensors", "is damaged"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"[]", b"{"])
def test_unfinished_work_that_is_damaged_is_not_continued(llama, tmp_path, monkeypatch, damaged, message, content):
    made = recipe(llama, tmp_path / "out", "lord")
    with monkeypatch.context() as patch:
        failing(patch, Artefacts, "save", 1, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            compress(made)
    (tmp_path / "out.partial" / damaged).write_bytes(content)
    with pytest.raises(InputError, match=message):
        compress(made, resume=True)


def test_a_report_that_makes_no_sense_is_no_finished_run(llama, tmp_path):
    made = recipe(llama, tmp_path / "out", "lord")
    report = compress(made).report
    (tmp_path / "out/report.json").write_text(json.dumps({**report, "made_from": [1]}))
    with pytest.raises(InputError, match="changed since"):
        compress(made, resume=True)


@pytest.mark.parametrize("metric", ["plain", "input"])
def test_a_tokenizer_that_makes_tokens_that_the_model_does_not_know(llama, tmp_path, metric):
    copied(llama, tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["e "])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="model makes token 320, the model knows 320: its tokenizer files belong"):
        compress_tiny(tmp_path / "model", tmp_path / "out", method={"name": "lord", "metric": metric})
    assert not (tmp_path / "out").exists()
