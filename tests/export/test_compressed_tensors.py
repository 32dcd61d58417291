"""compressed-tensors checkpoints through transformers and the library, which unpack them; no code of ours reads them."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrcompress.errors import InputError
from lrcompress.export.compressed_tensors import export_compressed_tensors
from lrcompress.export.packed import words
from tests.checkpoint.test_loading import IDS, load, logits
from tests.commands import run_cli
from tests.export.test_peft import eora

pytest.importorskip("compressed_tensors", reason="needs the extra compressed-tensors")

EXACT = {"rtol": 1e-4, "atol": 1e-4}


def read(folder, zeros=False):
    from transformers import CompressedTensorsConfig

    options = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        if zeros or (folder / "adapter").is_dir()
        else {}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return (PeftModel.from_pretrained(model, folder / "adapter") if (folder / "adapter").is_dir() else model).eval()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [5, 8, 32])
def test_words_are_the_librarys(bits, length):
    from compressed_tensors.compressors import pack_to_int32

    codes = torch.randint(2**bits, (7, length), generator=torch.Generator().manual_seed(0))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(words(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(words(codes.T, bits).T, pack_to_int32(signed, bits, packed_dim=0))


# architecture, recipe, bits that are packed, whether with zero points
CASES = [
    ("llama", {"method": "eora", "base": "rtn:3:16", "ratio": None, "rank": 0}, 4, False),
    ("llama", eora("rtn:3:16"), 4, False),
    ("llama", eora("gptq:2:16", metric="centred"), 4, False),
    ("qwen3", eora("rtn:4:16", bits=8), 4, True),
    ("llama", {"method": "eora", "base": "rtn:4:64", "ratio": None, "rank": 0}, 4, True),
]


@pytest.mark.parametrize(("architecture", "recipe", "bits", "zeros"), CASES)
def test_transformers_computes_the_same(compressed, tmp_path, architecture, recipe, bits, zeros):
    source, out = compressed(architecture, **recipe), tmp_path / "out"
    result = export_compressed_tensors(str(source), out)
    assert result["loss"] is None
    weights = [
        group["weights"]
        for group in json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    ]
    assert {(w["num_bits"], not w["symmetric"]) for w in weights} == {(bits, zeros)}
    torch.testing.assert_close(logits(read(out, zeros), IDS), logits(load(source), IDS), **EXACT)
    assert (out / "adapter").is_dir() == (recipe.get("rank") != 0)
    assert ("dequantize=True" in (out / "README.md").read_text()) == (zeros or (out / "adapter").is_dir())
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) == result["bytes"]["checkpoint"]


def test_coded_weights_are_rounded_and_the_loss_is_measured(compressed, tmp_path):
    source, out = compressed("llama", method="auto", ratio=None, bpw=6.0), tmp_path / "out"
    result = export_compressed_tensors(str(source), out)
    assert result["rounded"] == result["layers"] == 21
    assert abs(result["loss"]) < 0.005
    assert "perplexity" in result["notes"][0]
    model, ours = read(out), load(source)
    found, wanted = (m(input_ids=IDS).logits.log_softmax(-1) for m in (model, ours))
    assert float((found - wanted).abs().mean()) < 0.05
    tensors = load_file(out / "model.safetensors")
    from lrcompress.model.surgery import dense_parts, stored_layers

    for name, module in stored_layers(ours).items():
        codes = tensors[f"{name}.weight_packed"].view(torch.uint8).int() - 128
        weight, step = dense_parts(module)[0], tensors[f"{name}.weight_scale"]
        assert int(codes.abs().amax(1).min()) == 127
        assert float(((codes[:, : weight.shape[1]] * step - weight).abs() / step).max()) <= 0.5001


def test_what_has_no_such_form_is_refused(compressed, tmp_path, monkeypatch):
    for source, message in (
        (compressed("llama", method="lord"), "holds no integers"),
        (compressed("gpt2", **eora("rtn:3:16")), "Conv1D"),
        (compressed("llama", **eora("wanda:2:4")), "base stored as semi_sparse"),
        (compressed("llama", **eora("rtn:3:7")), "groups of 7 inputs"),
        (compressed("llama", **eora("rtn:3:16", target=["*.q_proj"])), r"q_proj 4 bits in groups of 16, k_proj dense"),
    ):
        with pytest.raises(InputError, match=message):
            export_compressed_tensors(str(source), tmp_path / "out")
    monkeypatch.setattr("lrcompress.export.compressed_tensors.MOST_LOSS", -1.0)
    with pytest.raises(InputError, match="in 8 bits with one scale a row has a perplexity"):
        export_compressed_tensors(str(compressed("llama", method="auto", ratio=None, bpw=6.0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(compressed, tmp_path):
    source = compressed("qwen3", **eora("rtn:4:16", bits=8))
    done = run_cli("export", source, "--to", "compressed-tensors", "-o", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "transformers needs" in done.stdout.replace("\n", " ")
    assert {t.dtype for t in load_file(tmp_path / "out/adapter/adapter_model.safetensors").values()} == {torch.bfloat16}
