"""GGUF files written here, tensor by tensor: every one of them is read, or the file is refused."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from lrcompress.checkpoint.cache import conversion_folder
from lrcompress.errors import InputError
from lrcompress.export.dense import export_dense
from lrcompress.export.peft import export_peft
from lrcompress.foreign.opening import open_dense
from tests.checkpoint.test_loading import load
from tests.foreign.gguf_files import KEYS, SIZES, interleaved, random_model, tensors_of, unchanged, write_file

LLAMA = interleaved({"q_proj": 4, "k_proj": 2})


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    """write(bias, extra, **keys): the file of a random Llama, and that model."""

    def run(bias, extra=None, **keys):
        model = random_model(LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=bias, mlp_bias=bias))
        tensors = tensors_of(model, "llama", LLAMA) | ({} if extra is None else {extra: np.ones(4)})
        return write_file(tmp_path / "model.gguf", "llama", {**KEYS, **keys}, tensors), model

    return run


def agree(path, model, tokens=100):
    """The file computes what the model does."""
    ids = torch.arange(tokens)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            load(open_dense(str(path)).folder)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("bias", [False, True])
def test_every_tensor_is_read(write, bias):
    agree(*write(bias))


@pytest.mark.parametrize("wrong", [{"embedding_length": 64}, {"embedding_length": 48}, {"vocab_size": 100}])
def test_a_file_that_contradicts_itself_is_refused(write, wrong):
    path, _ = write(False, **wrong)
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        open_dense(str(path))


@pytest.mark.parametrize("name", ["blk.1.attn_sinks.weight", "rope_others.weight"])
def test_a_tensor_without_a_place_is_refused(write, name):
    path, _ = write(False, extra=name)
    with pytest.raises(InputError, match=rf"{name}.*no place"):
        open_dense(str(path))


def test_experts_are_read(tmp_path):
    """Their gates and their other halves are tensors apart in the file, and one in the model."""
    sizes = {
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    model = random_model(Qwen3MoeConfig(**SIZES, **sizes))

    def halves(name, array):
        if not name.endswith("gate_up_proj"):
            return unchanged(name, array)
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}up_proj": array[:, 24:], f"{stem}gate_proj": array[:, :24]}

    keys = {"attention.key_length": 8, "attention.value_length": 8, "expert_count": 4, "expert_used_count": 2}
    keys["expert_feed_forward_length"] = 24
    agree(write_file(tmp_path / "m.gguf", "qwen3moe", KEYS | keys, tensors_of(model, "qwen3moe", halves)), model)


def test_what_an_older_version_converted_is_not_found(write):
    path, _ = write(False)
    assert conversion_folder([path], 1) != conversion_folder([path], 2)
    before = conversion_folder([path], 2)
    path.write_bytes(path.read_bytes() + b"x")
    assert conversion_folder([path], 2) != before


def test_a_file_becomes_a_folder_that_transformers_and_peft_load(write, tmp_path):
    path, model = write(True)
    found = export_dense(str(path), tmp_path / "out", dtype="float32")
    assert found["layers"] == 0
    ids = torch.arange(100)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        folder = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert folder.dtype == torch.float32
        torch.testing.assert_close(folder(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        adapted = get_peft_model(folder, LoraConfig(r=2, target_modules="all-linear"))
        torch.testing.assert_close(adapted(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    half = export_dense(str(path), tmp_path / "half")
    assert half["dtype"] == "bfloat16"
    stored, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "out"))
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert stored.keys() == whole.keys()
    assert "Converted from GGUF" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match="make a folder of the file with --to dense"):
        export_peft(str(path), tmp_path / "no")
    with pytest.raises(InputError, match="load a dense folder as it is"):
        export_dense(str(tmp_path / "out"), tmp_path / "no")
    assert not (tmp_path / "no").exists()
