"""Mapped files: the pages that no tensor of a loaded model lies in are given back."""

import gc
import mmap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.mapped import mapped_files, release_unused

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is mapped")
PAGES = 64


def resident(path) -> int:
    """Bytes of a file that are mapped into this process and in its memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        if "-" in parts[0]:
            inside = len(parts) == 6 and parts[5] == str(path)
        elif inside and parts[0] == "Rss:":
            total += 1024 * int(parts[1])
    return total


class Holder(nn.Module):
    """Three tensors of a file, the one between two others given up."""

    def __init__(self, path):
        super().__init__()
        with safe_open(path, "pt") as file:
            self.first = nn.Parameter(file.get_tensor("a"))
            self.between = file.get_tensor("b")
            self.register_buffer("last", file.get_tensor("c"))


@pytest.fixture
def holder(tmp_path):
    """A module and the file that its tensors lie in, all of whose pages are in memory."""
    path = (tmp_path / "model.safetensors").resolve()
    whole = {name: torch.arange(PAGES * mmap.PAGESIZE // 4, dtype=torch.float32) + n for n, name in enumerate("abc")}
    save_file(whole, path)
    made = Holder(path)
    if not [mapping for mapping in mapped_files() if mapping.path == path]:
        pytest.skip("this safetensors does not map its files")
    assert all(tensor.sum() for tensor in (made.first, made.between, made.last))
    assert resident(path) >= 3 * PAGES * mmap.PAGESIZE
    return made, path, whole


def test_what_lies_between_used_tensors_is_given_back_and_nothing_else(holder):
    made, path, whole = holder
    made.kept = nn.Module()
    made.kept.first = made.first  # tied: the same numbers twice
    release_unused(made)
    assert resident(path) == pytest.approx(2 * PAGES * mmap.PAGESIZE, abs=4 * mmap.PAGESIZE)
    for name, tensor in (("a", made.first), ("b", made.between), ("c", made.last)):
        assert torch.equal(tensor, whole[name]), name


def test_numbers_that_another_model_has_changed_in_the_same_file_stay_changed(holder):
    made, path, whole = holder
    made.between.add_(1)
    release_unused(made)
    assert torch.equal(made.between, whole["b"] + 1)
    assert resident(path) >= 3 * PAGES * mmap.PAGESIZE


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"method": "auto", "ratio": None, "bpw": 4}, torch.bfloat16),
        ({"method": "auto", "ratio": None, "bpw": 4}, torch.float32),
        ({"method": {"name": "cospadi", "rounds": 1}, "ratio": 0.3}, torch.float32),
        ({"method": "lord"}, torch.bfloat16),
    ],
)
def test_a_loaded_model_computes_the_same_from_pages_that_were_given_back(compressed, changes, dtype, monkeypatch):
    folder = compressed(dtype="bfloat16", **changes)
    tokens = torch.arange(1, 20)[None]
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    release_unused(found)
    gc.collect()
    monkeypatch.setattr("lrcompress.checkpoint.integration.release_unused", lambda model: None)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
