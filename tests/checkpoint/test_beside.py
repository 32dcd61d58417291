"""What belongs to tokenizer, processor and generation goes with the weights, whatever is written; nothing else does."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from lrcompress.checkpoint.cache import content_digest
from lrcompress.checkpoint.writer import copy_files_beside
from lrcompress.export.dense import export_dense
from lrcompress.export.peft import export_peft
from lrcompress.foreign.hub import HUB_FILES
from lrcompress.heal import HealSpec, heal
from lrcompress.stages.workspace import files_identity
from lrcompress.training.settings import Settings
from tests.conftest import compress_tiny

TEMPLATES = {"default": "{{ messages[0].content }}", "tool_use": "tool {{ messages[0].content }}"}
BELONG = {
    "vocab.tiktoken", "source.spm", "bpe.codes", "tokenizer.model", "tokenizer.model.v3", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.json", "vocab.bpe", "tekken.json",
    "qformer_tokenizer/tokenizer_config.json", "qformer_tokenizer/vocab.txt",
}  # fmt: skip
OTHER = {
    "pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "README.md", "picture.png", "original/a.pth",
    "original/params.json", ".cache/tokenizer_config.json", "checkpoint-5/tokenizer_config.json",
    "checkpoint-5/model.safetensors", "runs/events.out",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(llama, tmp_path_factory):
    """The tiny Llama with named chat templates, as transformers saves them, and files of many kinds."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("source") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates/tool_use.jinja").exists()
    for name in BELONG | OTHER:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() and path.suffix != ".safetensors":
            path.write_text("{}")
    shutil.copyfile(folder / "model.safetensors", folder / "checkpoint-5/model.safetensors")
    return folder


def belongs(folder, source):
    """Whether all that belongs is in the folder, byte for byte, and nothing of the rest but what we write ourselves."""
    for name in BELONG | {"chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.json"}:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    for name in OTHER - {"README.md"}:
        assert not (folder / name).exists(), name
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATES


@pytest.fixture(scope="module")
def compressed(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "compressed"
    compress_tiny(source, folder, method={"name": "eora", "factor_bits": 16}, base="rtn:3:16", rank=3, ratio=None)
    return folder


def test_compress_export_and_heal_take_it_along(source, compressed, tmp_path):
    belongs(compressed, source)
    export_dense(str(compressed), tmp_path / "dense")
    belongs(tmp_path / "dense", source)
    export_peft(str(compressed), tmp_path / "adapter")
    belongs(tmp_path / "adapter/base", source)
    settings = Settings(steps=1, device="cpu", distill="none")
    heal(HealSpec(str(compressed), ("python-docs",), 4, 32, None, str(tmp_path / "healed"), settings))
    belongs(tmp_path / "healed", source)


def test_nothing_but_code_depends_on_whether_code_is_taken(source, tmp_path):
    (source / "tokenization_mine.py").write_text("pass")
    for code in (False, True):
        (tmp_path / str(code)).mkdir()
        copy_files_beside(source, tmp_path / str(code), code=code)
        belongs(tmp_path / str(code), source)
        assert (tmp_path / str(code) / "tokenization_mine.py").exists() is code
        assert not (tmp_path / str(code) / "config.json").exists()
    (source / "tokenization_mine.py").unlink()


def test_what_is_copied_is_downloaded_too(source):
    from huggingface_hub.utils import filter_repo_objects

    names = [*BELONG, "additional_chat_templates/tool_use.jinja", "pytorch_model.bin", "optimizer.pt"]
    assert set(filter_repo_objects(names, allow_patterns=list(HUB_FILES))) == set(names[:-2])


def test_a_changed_template_is_another_model(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "copy")
    assert content_digest(folder) == content_digest(source)
    before = files_identity(folder), content_digest(folder)
    (folder / "additional_chat_templates/tool_use.jinja").write_text("other")
    assert files_identity(folder) != before[0]
    assert content_digest(folder) != before[1]
    assert json.loads((folder / "generation_config.json").read_text()) is not None
