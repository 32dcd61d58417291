"""Mapped files: left where few of their bytes are used."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.mapped import mapped_files
from tests.conftest import compress_tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")


@pytest.fixture(scope="module")
def masked(llama, tmp_path_factory):
    """A checkpoint in bfloat16 whose dictionaries have bit masks."""
    folder = tmp_path_factory.mktemp("mapped") / "cospadi"
    compress_tiny(llama, folder, method={"name": "cospadi", "rounds": 1}, ratio=0.3, dtype="bfloat16")
    return folder


def inside(model, folder) -> list[bool]:
    """Of every stored tensor, whether it lies in the folder's files."""
    ranges = [(start, stop) for start, stop, path in mapped_files() if path.parent == folder.resolve()]
    tensors = [t for t in model.state_dict().values() if t.numel()]
    return [any(start <= t.data_ptr() < stop for start, stop in ranges) for t in tensors]


def test_a_model_of_the_files_dtype_may_lie_in_them(masked):
    """All or nothing: integers are not copied out of files that the numbers keep in memory."""
    found = inside(AutoModelForCausalLM.from_pretrained(masked, dtype=torch.bfloat16), masked)
    assert all(found) or not any(found)


def test_a_converted_model_leaves_its_files(masked):
    model = AutoModelForCausalLM.from_pretrained(masked, dtype=torch.float32)
    assert not any(inside(model, masked))
    gc.collect()
    assert not [path for _, _, path in mapped_files() if path.parent == masked.resolve()]
    expected = AutoModelForCausalLM.from_pretrained(masked, dtype=torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
