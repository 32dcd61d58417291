"""Reading the next block, computing and waiting for the disk go on at the same time."""

import errno
import os
import threading

import pytest
import torch

from lrcompress.checkpoint.experts import open_skeleton
from lrcompress.checkpoint.folder import read_config_file
from lrcompress.checkpoint.manifest import Manifest
from lrcompress.checkpoint.multiplied import Multiplied
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import ResourceError
from lrcompress.model.blocks import BlockWalker
from lrcompress.stages import store
from tests.conftest import compress_tiny


@pytest.fixture
def hints(monkeypatch):
    """What was asked of the operating system: (file name, bytes) of every range."""
    found = []

    def note(descriptor, offset, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        found.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.pread(descriptor, length, offset)))

    monkeypatch.setattr(os, "posix_fadvise", note)
    return found


needs_hints = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no such hints")


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@needs_hints
def test_a_hint_names_the_bytes_of_the_tensors(make_model, hints):
    reader = CheckpointReader(make_model("llama", shards=True))
    reader.will_read(reader.names())
    assert {data for _, data in hints} == {raw(tensor) for _, tensor in reader.read(reader.names())}
    assert len({path for path, _ in hints}) > 1


@needs_hints
def test_hints_for_a_compressed_checkpoint_name_what_it_stores(llama, tmp_path, hints):
    folder = compress_tiny(llama, tmp_path / "out").folder
    manifest = Manifest.from_json(read_config_file(folder)["quantization_config"])
    hints.clear()
    Multiplied(folder, manifest, "out").will_read(["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
    stored = CheckpointReader(folder)
    names = [n for n in stored.names() if "layers.0.self_attn.q_proj." in n or n == "model.norm.weight"]
    assert sorted(data for _, data in hints) == sorted(raw(stored.tensor(name)) for name in names)
    assert len(names) > 3


@needs_hints
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_next_block_is_asked_for_in_either_direction(make_model, hints, architecture):
    folder = make_model(architecture)
    skeleton, reader = open_skeleton(folder)
    walker = BlockWalker(skeleton, reader, torch.device("cpu"), torch.float32)
    stored = CheckpointReader(folder)

    def asked(index, then):
        hints.clear()
        with walker.block(index):
            return {data for _, data in hints} == {
                raw(stored.tensor(name)) for name in stored.names() if f"layers.{then}." in name
            }

    assert asked(0, 1)
    last = len(walker.blocks) - 1
    assert asked(last, last + 1)
    assert asked(last - 1, last - 2)


def test_the_next_block_is_encoded_while_the_disk_is_waited_for(llama, tmp_path, monkeypatch):
    blocks, overlapped = [], []
    moved = threading.Condition()
    encoder, fsync = store.Encoder, os.fsync

    def encode(*args):
        with moved:
            blocks.append(1)
            moved.notify_all()
        return encoder(*args)

    def slow(descriptor):
        if threading.current_thread() is not threading.main_thread():
            with moved:
                before = len(blocks)
                overlapped.append(moved.wait_for(lambda: len(blocks) > before, timeout=0.5))
        fsync(descriptor)

    monkeypatch.setattr(store, "Encoder", encode)
    monkeypatch.setattr(os, "fsync", slow)
    compress_tiny(llama, tmp_path / "out")
    assert any(overlapped)
    assert not overlapped[-1]  # nothing is left to encode


def test_a_disk_that_fails_while_the_next_block_is_encoded_ends_the_run(llama, tmp_path, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "no space")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="full"):
            compress_tiny(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
