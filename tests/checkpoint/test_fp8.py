"""Checkpoints that store fp8 with a scale per block: the numbers that they stand for, by transformers and by hand."""

import json
import shutil
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.experts import open_skeleton
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.evaluation.loading import load_network
from lrcompress.foreign.opening import open_dense
from tests.conftest import compress_tiny

SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}


def in_blocks(weight, size):
    """Codes and scales of a matrix in blocks of size × size, the last ones cut."""
    rows, columns = (-(-n // size) for n in weight.shape)
    scale = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scale[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


@pytest.fixture
def folder(make_model, tmp_path):
    """A llama whose layers are in fp8, in bfloat16 otherwise."""
    out = tmp_path / "fp8"
    shutil.copytree(make_model("llama"), out, copy_function=shutil.copyfile)
    tensors = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = in_blocks(tensor, 16)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    describe(out, SETTINGS)
    return out


def describe(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": settings}))


reads_fp8 = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.19"), reason="transformers 5.16 fails on fp8 models without experts"
)


@reads_fp8
def test_the_weights_are_those_that_transformers_reads(folder):
    reader = CheckpointReader(folder)
    meant = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    read = dict(reader.read(reader.names()))
    assert sorted(read) == sorted(name for name in meant if name in read)
    assert sum("_proj" in name for name in read) == sum("_proj" in name for name in meant) > 0
    for name, tensor in read.items():
        assert reader.meta(name).dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, meant[name]), name
    assert reader.dtype == torch.bfloat16
    assert reader.bytes < 2 * reader.numbers


def test_blocks_at_the_edge_may_be_cut(tmp_path):
    """As DeepSeek's kv_a_proj_with_mqa of 576 rows in blocks of 128."""
    weight = torch.randn(36, 40, generator=torch.Generator().manual_seed(0))
    codes, scale = in_blocks(weight, 16)
    save_file({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": SETTINGS}))
    found = CheckpointReader(tmp_path).tensor("a.weight")
    for i, j in [(0, 0), (15, 39), (16, 16), (35, 0), (35, 39)]:
        assert found[i, j] == codes[i, j].float() * scale[i // 16, j // 16]


@pytest.mark.parametrize("index", [0, 2])
def test_fused_experts_are_read_one_at_a_time(tmp_path, index):
    parts = [in_blocks(torch.randn(32, 16, generator=torch.Generator().manual_seed(i)), 16) for i in range(3)]
    codes, scale = (torch.stack(part) for part in zip(*parts, strict=True))
    save_file({"experts.up": codes, "experts.up_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": SETTINGS}))
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read_slice("experts.up", index), reader.tensor("experts.up")[index : index + 1])
    assert reader.read_slice("experts.up", index)[0, 31, 15] == codes[index, 31, 15].float() * scale[index, 1, 0]


@pytest.mark.parametrize(
    ("scale", "value"),
    [(torch.tensor(0.5), 0.5), (torch.tensor([0.25]), 0.25), (torch.full((2, 1), 129, dtype=torch.uint8), 4.0)],
)
def test_other_scales(tmp_path, scale, value):
    """One for the whole tensor, or exponents of two (byte - 127) for wider blocks, as in MXFP8."""
    codes = torch.full((2, 4), 3.0).to(torch.float8_e4m3fn)
    extra = {"a.activation_scale": torch.tensor(7.0)}
    save_file({"a.weight": codes, "a.weight_scale_inv": scale, **extra}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert reader.names() == ["a.weight"]
    assert torch.equal(reader.tensor("a.weight"), torch.full((2, 4), 3 * value).bfloat16())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "has no scale"),
        ({"a.weight_scale_inv": torch.ones(3, 5)}, "no grid of its blocks"),
        ({"a.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, "no scale of fp8"),
    ],
)
def test_a_scale_that_is_missing_or_does_not_fit_is_named(tmp_path, more, said):
    save_file({"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), **more}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=said):
        CheckpointReader(tmp_path)


@reads_fp8
def test_it_is_compressed_and_no_longer_named_fp8(folder, tmp_path):
    result = compress_tiny(
        folder, tmp_path / "out", evaluate={"tasks": ["tokens:python-docs@64"], "against": "dense", "limit": 2}
    )
    config = json.loads((result.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] == "lrcompress"
    sizes = {t["name"]: t["dense_bytes"] for t in result.report["targets"]}
    meant = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert all(size == 2 * meant[f"{name}.weight"].numel() for name, size in sizes.items())
    assert not any("scale" in name for name in CheckpointReader(result.folder).names())


def test_the_loaded_model_is_the_one_that_is_compressed(make_model, tmp_path):
    """With blocks that are cut at the edges, where transformers' own reading divides by other scales or fails."""
    meant = AutoModelForCausalLM.from_pretrained(make_model("llama"), dtype=torch.float32).eval()
    folder = tmp_path / "cut"
    shutil.copytree(make_model("llama"), folder, copy_function=shutil.copyfile)
    tensors = {}
    for name, tensor in meant.state_dict().items():
        if "_proj" not in name:
            tensors[name] = tensor.clone()
            continue
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale = in_blocks(tensor, 20)
        spread = scale.repeat_interleave(20, 0).repeat_interleave(20, 1)[: tensor.shape[0], : tensor.shape[1]]
        tensor.copy_((codes.float() * spread).bfloat16())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    describe(folder, {**SETTINGS, "weight_block_size": [20, 20]})
    _, loaded = load_network(str(folder), device="cpu")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, meant(ids).logits)


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({**SETTINGS, "expert_dtype": "fp4"}, "packed in four bits"),
        ({"quant_method": "gptq", "bits": 4}, "--base"),
        ({"quant_method": "mxfp4"}, "Mxfp4Config"),
        ({"quant_method": "awq"}, "dense checkpoint that it was made from"),
    ],
)
def test_what_is_stored_otherwise_is_named_with_a_cure(folder, settings, cure):
    describe(folder, settings)
    with pytest.raises(InputError, match=rf"\({settings['quant_method']}\): .*{cure}"):
        open_dense(str(folder))


def test_experts_are_read_as_those_of_a_checkpoint_that_is_not_quantised(make_model, tmp_path):
    """A mixture of DeepSeek-V3's, its layers in fp8, and beside it what they stand for, in bfloat16."""
    source = make_model("deepseek_v3")
    names = CheckpointReader(source).names()
    stored, meant = {}, {}
    for name, tensor in CheckpointReader(source).read(names):
        stored[name] = meant[name] = tensor.bfloat16()
        if "_proj" in name and tensor.dim() == 2:
            codes, scale = in_blocks(tensor.float(), 16)
            stored[name], stored[f"{name}_scale_inv"] = codes, scale
            spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[: tensor.shape[0], : tensor.shape[1]]
            meant[name] = (codes.float() * spread).bfloat16()
    assert any(".experts.1." in name for name in stored if name.endswith("_scale_inv"))
    for folder, tensors in ((tmp_path / "fp8", stored), (tmp_path / "plain", meant)):
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    describe(tmp_path / "fp8", SETTINGS)
    readers = [open_skeleton(tmp_path / name)[1] for name in ("fp8", "plain")]
    assert readers[0].names() == readers[1].names()
    for (name, ours), (_, theirs) in zip(*(reader.read(reader.names()) for reader in readers), strict=True):
        assert torch.equal(ours, theirs), name
