"""Which of a folder's files are read: those that transformers reads, whatever else lies there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.checkpoint.shards import remark
from lrcompress.errors import InputError
from lrcompress.report.inspection import inspect_model
from lrcompress.report.progress import Reporter

HEAD = "model.norm.weight"


@pytest.fixture
def both(make_model, tmp_path):
    """both(name): a model with other numbers in shards and in file `name` of one folder; the file's norm."""

    def run(name):
        shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
        whole = CheckpointReader(tmp_path)
        tensors = dict(whole.read(whole.names()))
        (tmp_path / "model.safetensors").rename(tmp_path / name)
        names = sorted(tensors)
        shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for shard, part in shards.items():
            save_file({key: tensors[key] + 1 for key in part}, tmp_path / shard, metadata={"format": "pt"})
        where = {key: shard for shard, part in shards.items() for key in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return tmp_path, tensors[HEAD]

    return run


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)


def test_the_single_file_comes_before_the_shards(both):
    folder, norm = both("model.safetensors")
    assert torch.equal(CheckpointReader(folder).tensor(HEAD), norm)
    assert torch.equal(CheckpointReader(folder).tensor(HEAD), loaded(folder).model.norm.weight)


def test_shards_are_read_where_a_file_of_another_name_lies_beside(both):
    folder, norm = both("consolidated.safetensors")
    assert torch.equal(CheckpointReader(folder).tensor(HEAD), norm + 1)
    assert torch.equal(CheckpointReader(folder).tensor(HEAD), loaded(folder).model.norm.weight)
    assert remark(folder) is None


def test_a_file_that_the_config_names_comes_first(both):
    folder, norm = both("chosen.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "chosen.safetensors"}))
    assert torch.equal(CheckpointReader(folder).tensor(HEAD), norm)
    assert torch.equal(CheckpointReader(folder).tensor(HEAD), loaded(folder).model.norm.weight)


@pytest.mark.parametrize("name", ["../outside.safetensors", "gone.safetensors", "model.bin", 7])
def test_the_config_may_only_name_files_beside_it(both, name):
    folder, _ = both("model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(InputError, match=r"transformers_weights: only files beside"):
        CheckpointReader(folder)


def test_a_line_says_what_is_read(both):
    folder, _ = both("model.safetensors")
    reporter = Reporter(quiet=True)
    inspect_model(str(folder), reporter=reporter)
    assert reporter.warnings == [
        f"{folder} holds model.safetensors and model.safetensors.index.json: the first is read, as transformers does, "
        "the other is not"
    ]


@pytest.mark.parametrize(("names", "cure"), [(["weights"], "rename"), (["a", "b"], "download")])
def test_files_that_transformers_would_not_find_are_named(make_model, tmp_path, names, cure):
    for name in names:
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=rf"neither model\.safetensors nor .*: {cure}"):
        CheckpointReader(tmp_path)
    shutil.copyfile(make_model("llama") / "config.json", tmp_path / "config.json")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        loaded(tmp_path)
