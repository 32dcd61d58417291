"""Split GGUF files, whichever part is named, and folders that hold nothing else."""

import shutil

import pytest
import torch
from transformers import LlamaConfig

from lrcompress.errors import InputError
from lrcompress.foreign.opening import check_model, open_dense, short_name
from lrcompress.stages.workspace import files_identity
from tests.foreign.gguf_files import KEYS, SIZES, random_model, tensors_of, write_file, write_part
from tests.foreign.test_gguf import LLAMA, agree

NAMES = [f"model-Q8-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def split(tmp_path):
    """split(tied): a folder with a random Llama in three parts, its output matrix in the last, and that model."""

    def run(tied=False):
        model = random_model(LlamaConfig(**SIZES, tie_word_embeddings=tied))
        tensors = list(tensors_of(model, "llama", LLAMA).items())
        folder, third = tmp_path / "split", -(-len(tensors) // 3)
        folder.mkdir()
        parts = [dict(tensors[i * third : (i + 1) * third]) for i in range(3)]
        assert ("output.weight" in parts[2]) is not tied
        said = {"split.no": 0, "split.count": 3, "split.tensors.count": len(tensors)}
        write_file(folder / NAMES[0], "llama", KEYS, parts[0], said)
        for i in (1, 2):
            write_part(folder / NAMES[i], "llama", i, 3, len(tensors), parts[i])
        return folder, model

    return run


@pytest.mark.parametrize("named", [*NAMES, "."])
def test_all_parts_are_read_whatever_is_named(split, named):
    folder, model = split()
    agree(folder / named, model)


def test_a_tied_matrix_is_in_no_part(split):
    folder, model = split(tied=True)
    agree(folder, model)


def test_parts_are_one_conversion_with_one_name(split):
    folder, _ = split()
    found = {open_dense(str(folder / name)).folder for name in NAMES}
    assert len(found) == 1
    assert {short_name(str(folder / name)) for name in NAMES} == {"model-Q8"}
    before = files_identity(folder / NAMES[0])
    (folder / NAMES[2]).write_bytes((folder / NAMES[2]).read_bytes() + bytes(32))
    assert files_identity(folder / NAMES[0]) != before
    assert open_dense(str(folder / NAMES[0])).folder not in found


@pytest.mark.parametrize("named", [NAMES[0], NAMES[2], "."])
def test_a_missing_part_is_named(split, named):
    folder, _ = split()
    (folder / NAMES[1]).unlink()
    with pytest.raises(InputError, match=rf"one of 3 parts, and {NAMES[1]} is not beside it: download all parts"):
        open_dense(str(folder / named))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (NAMES[0], "whole.gguf", "one of 3 parts: give them the names"),
        (NAMES[1], "model-Q8-00004-of-00003.gguf", "named as part 4 of 3"),
    ],
)
def test_parts_under_other_names(split, old, new, said):
    folder, _ = split()
    (folder / old).rename(folder / new)
    with pytest.raises(InputError, match=said):
        open_dense(str(folder / new))


def test_parts_of_two_models(split):
    folder, _ = split()
    shutil.copyfile(folder / NAMES[1], folder / NAMES[2])
    with pytest.raises(InputError, match="hold other tensors than they say"):
        open_dense(str(folder))


def test_a_folder_with_one_model(split, tmp_path):
    """What makes pictures its input is no second one."""
    folder, model = split()
    (folder / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    (folder / "config.json").write_text("{}")
    agree(folder, model)


def test_a_folder_with_several_models_asks_for_one(split):
    folder, _ = split()
    (folder / "model-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=rf"holds 2 GGUF models \(model-Q4.gguf, {NAMES[0]}\): pass the path of one"):
        check_model(str(folder))


def test_other_weights_come_first(split, tmp_path):
    folder, _ = split()
    torch.save({}, folder / "pytorch_model.bin")
    assert check_model(str(folder)) == folder
