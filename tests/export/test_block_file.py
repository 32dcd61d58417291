"""A GGUF file of llama.cpp's block types, from the command line to the numbers in it."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from lrcompress.export.gguf import export_gguf
from lrcompress.ggml.file_types import Model, Shape, types_of
from tests.checkpoint.test_loading import IDS, load, logits
from tests.commands import run_cli
from tests.export.converter import NAMES, rotated

CONVERTER = Path(__file__).with_name("converter.py")


@pytest.fixture
def made(llama, once):
    """A file, the checkpoint of its blocks, the dense model."""

    def compress(folder):
        folder.mkdir()
        done = run_cli(
            "compress", llama, "-o", folder / "model.gguf", "--type", "q4_k_m", "--keep", folder / "kept",
            "--converter", CONVERTER, "--samples", 4, "--seqlen", 32, "--json", folder / "result.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    folder = once("blocks", compress)
    return folder / "model.gguf", folder / "kept", llama


def contents(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    return {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def test_types_are_those_of_the_file_type_and_numbers_those_of_the_checkpoint(made):
    file, kept, dense = made
    found, loaded = contents(file), load(kept)
    shapes = [Shape(name, values.shape) for name, (_, values) in found.items()]
    assert {name: kind for name, (kind, values) in found.items() if values.ndim > 1} == {
        name: kind for name, kind in types_of("Q4_K_M", shapes, Model(3, 2)).items() if kind is not None
    }
    checked = 0
    for block in range(3):
        for module, name in NAMES.items():
            layer = loaded.get_submodule(f"model.layers.{block}.{module}")
            if name in ("attn_norm", "ffn_norm", "ffn_down"):
                continue
            weight = layer.dense().detach().float()
            if name in ("attn_q", "attn_k"):
                weight = rotated(weight, {"attn_q": 4, "attn_k": 2}[name])
            np.testing.assert_array_equal(found[f"blk.{block}.{name}.weight"][1], weight.numpy())
            checked += 1
    assert checked == 18
    original = load(dense)
    for name, weight in (("token_embd", original.model.embed_tokens.weight), ("output", original.lm_head.weight)):
        kind, values = found[f"{name}.weight"]
        assert kind == ("Q8_0" if name == "output" else "Q5_0")
        close = {"Q8_0": 0.01, "Q5_0": 0.06}[kind]
        assert np.linalg.norm(values - weight.detach().numpy()) < close * np.linalg.norm(weight.detach().numpy())
    assert found["blk.0.ffn_down.weight"][0] == "F16"
    np.testing.assert_array_equal(found["output_norm.weight"][1], original.model.norm.weight.detach().numpy())


def test_metadata_are_the_converters_with_the_file_type(made):
    file, _, dense = made
    fields = gguf.GGUFReader(file).fields
    assert fields["general.file_type"].contents() == 15
    assert fields["general.quantization_version"].contents() == 2
    assert fields["general.name"].contents() == dense.name
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["tokenizer.ggml.tokens"].contents() == ["<s>", "</s>", "ä"]


def test_what_was_kept_computes_about_the_same_and_gives_the_same_file(made, tmp_path):
    file, kept, dense = made
    assert sorted(path.name for path in file.parent.iterdir()) == ["kept", "model.gguf", "result.json"]
    assert json.loads((file.parent / "result.json").read_text())["file"]["bytes"] == file.stat().st_size
    ours, before = logits(load(kept), IDS), logits(load(dense), IDS)
    assert 0 < float((ours - before).norm()) < 0.2 * float(before.norm())
    export_gguf(str(kept), tmp_path / "again.gguf", converter=CONVERTER)
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_a_size_is_kept_and_types_follow_from_one_price(make_model, tmp_path):
    file = tmp_path / "sized.gguf"
    done = run_cli(
        "compress", make_model("llama"), "-o", file, "--size", "50KB", "--keep", tmp_path / "kept",
        "--converter", CONVERTER, "--samples", 4, "--seqlen", 32,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 46000 < file.stat().st_size <= 50000
    found = contents(file)
    kinds = {kind for name, (kind, _) in found.items() if name.startswith("blk") and "attn_q" in name}
    assert kinds <= {"IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q8_0"}
    weight = load(tmp_path / "kept").get_submodule("model.layers.0.self_attn.v_proj").dense().detach().float()
    np.testing.assert_array_equal(found["blk.0.attn_v.weight"][1], weight.numpy())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "x.gguf"], "say which --type"),
        (["-o", "x.gguf", "--type", "Q4_K_X"], "Q4_K_S"),
        (["-o", "x.gguf", "--type", "Q4_0", "--ratio", "0.5"], "give one of them"),
        (["-o", "x", "--type", "Q4_0", "--method", "lord"], "method ggml"),
        (["-o", "x", "--method", "ggml", "--ratio", "0.5"], "--type Q4_K_M"),
        (["-o", "x.gguf", "--size", "9KB", "--samples", "4", "--seqlen", "32"], "ask for at least"),
        (["-o", "x.gguf", "--type", "Q4_0", "--allocator", "uniform"], "nothing to decide"),
        (["-o", "x", "--ratio", "0.5", "--keep", "y"], "--keep y"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(make_model, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    done = run_cli("compress", make_model("llama"), "--converter", CONVERTER, *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_writes_folders(make_model, tmp_path):
    from lrcompress.errors import InputError
    from tests.conftest import compress_tiny

    with pytest.raises(InputError, match="name a folder"):
        compress_tiny(make_model("llama"), tmp_path / "x.gguf", method="ggml", type="Q4_0", ratio=None)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_name_themselves_are_read_in_any_order():
    from lrcompress.foreign.converter import name_rows, read_rows

    marked = torch.cat([name_rows(300, 70000, 16)[[5, 69999, 128]], name_rows(1, 3, 16)])
    site, row = read_rows(marked)
    assert site.tolist() == [300, 300, 300, 1, 1, 1]
    assert row.tolist() == [5, 69999, 128, 0, 1, 2]
    assert read_rows(torch.randn(4, 16)) is None
