"""Reading folders that are damaged, hostile or simply not checkpoints."""

import json

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.foreign.opening import open_model


@pytest.fixture
def folder(tmp_path):
    save_file(
        {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
    )
    return tmp_path


def test_tensors_come_back_as_they_are(folder):
    reader = CheckpointReader(folder)
    assert reader.names() == ["a", "b"]
    assert torch.equal(dict(reader.read(["a"]))["a"], torch.arange(12.0).reshape(3, 4))
    assert reader.meta("b").dtype == torch.bfloat16
    assert reader.bytes == 12 * 4 + 2 * 2
    assert reader.dtype == torch.float32


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        CheckpointReader(folder)


def test_a_non_finite_weight_is_named(tmp_path):
    save_file({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"tensor w in .* non-finite"):
        list(CheckpointReader(tmp_path).read(["w"]))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 7])
def test_an_index_may_only_name_files_beside_it(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"index|named|names"):
        CheckpointReader(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InputError, match=r"gone\.safetensors is missing"):
        CheckpointReader(folder)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pickled"):
        CheckpointReader(tmp_path)


def test_two_shards_with_one_tensor(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="so does"):
        CheckpointReader(folder)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_an_input_error_or_harmless(tmp_path, data):
    """Bytes changed or cut anywhere: the reader refuses or reads, and never fails otherwise."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(12.0), "b": torch.ones(3, dtype=torch.int16)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        reader = CheckpointReader(tmp_path)
        list(reader.read(reader.names()))
    except InputError:
        pass


def test_code_that_comes_with_a_checkpoint_of_the_hub_is_fetched(monkeypatch, tmp_path):
    """It is run with --trust-remote-code only; without its files that has nothing to run."""
    wanted = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: wanted.extend(allow_patterns) or str(tmp_path)
    )
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    open_model("someone/something")
    files = ["config.json", "modeling_own.py", "own/blocks.py", "model.safetensors", "pytorch_model.bin", "a.pkl"]
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=wanted))
    assert kept == files[:4]
