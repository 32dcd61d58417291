"""The streaming writer against the library's reader."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file

from lrcompress.checkpoint.writer import ShardedWriter, disk_errors, replace_tensors
from lrcompress.errors import ResourceError

TENSORS = [
    ("a", torch.arange(10.0)),
    ("b", torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()),
    ("empty", torch.empty(0)),
    ("index", torch.arange(9, dtype=torch.int16)),
    ("view", torch.arange(12.0).reshape(3, 4).T),
    ("last", torch.ones(5, dtype=torch.float16)),
]


def read_all(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("limit", [10**9, 100, 1])
def test_the_library_reads_what_was_streamed(tmp_path, limit):
    writer = ShardedWriter(tmp_path, TENSORS, limit)
    writer.write(TENSORS)
    writer.close()
    found = read_all(tmp_path)
    assert found.keys() == dict(TENSORS).keys()
    for name, tensor in TENSORS:
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (limit != 10**9)
    if index.exists():
        for name, file in json.loads(index.read_text())["weight_map"].items():
            assert name in load_file(tmp_path / file)


@pytest.mark.parametrize("limit", [10**9, 100, 1])
@pytest.mark.parametrize("stop", range(6))
def test_resuming_gives_the_same_bytes(tmp_path, limit, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    writer = ShardedWriter(whole, TENSORS, limit)
    writer.write(TENSORS)
    writer.close()
    first = ShardedWriter(parts, TENSORS, limit)
    first.write(TENSORS[:stop])
    first.commit()
    done = first.done
    first.write(TENSORS[stop : stop + 1])  # written but never committed: the next run writes it again
    first.commit()
    second = ShardedWriter(parts, TENSORS, limit, done)
    second.write(TENSORS[done:])
    second.close()
    for path in whole.iterdir():
        assert path.read_bytes() == (parts / path.name).read_bytes()


@pytest.mark.parametrize("limit", [10**9, 100, 1])
def test_replaced_tensors_leave_all_else_as_it_is(tmp_path, limit):
    writer = ShardedWriter(tmp_path, TENSORS, limit)
    writer.write(TENSORS)
    writer.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = {"b": torch.full((4, 6), 3.0, dtype=torch.bfloat16), "view": torch.zeros(4, 3)}
    for wrong in ({**new, "c": torch.ones(2)}, {**new, "a": torch.ones(9)}, {**new, "a": torch.arange(10)}):
        with pytest.raises(ValueError, match="is stored in"):
            replace_tensors(tmp_path, wrong)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    replace_tensors(tmp_path, new)
    found = read_all(tmp_path)
    for name, tensor in TENSORS:
        assert torch.equal(found[name], new.get(name, tensor))
    replace_tensors(tmp_path, {name: dict(TENSORS)[name] for name in new})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unplanned_tensor_is_refused(tmp_path):
    writer = ShardedWriter(tmp_path, TENSORS, 100)
    with pytest.raises(ValueError, match="planned a"):
        writer.write([("b", TENSORS[1][1])])
    with pytest.raises(ValueError, match="not written"):
        writer.close()


def test_a_full_disk_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match="--resume"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")
