"""Sums of a base and a correction through transformers: real files, every base."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrcompress.errors import InputError
from lrcompress.formats import StoredLinear
from lrcompress.model.surgery import dense_parts, stored_layers
from tests.checkpoint.test_loading import IDS, load, logits

# (base, rank, bits of the factors)
CASES = [("rtn:3:16", 2, 16), ("rtn:2:7", 0, 16), ("gptq:4:16", 3, 8), ("magnitude:2:4", 2, 4), ("wanda:2:4", 1, 16),
         ("sparsegpt:2:4", 2, 8)]  # fmt: skip


@pytest.fixture
def corrected(compressed):
    def make(architecture="llama", base="rtn:3:16", rank=2, bits=16, **recipe):
        method = {"name": "eora", "factor_bits": bits}
        return compressed(architecture, method=method, base=base, rank=rank, ratio=None, **recipe)

    return make


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(("base", "rank", "bits"), CASES)
def test_loaded_equals_the_dense_model_with_the_formats_put_in_place(
    make_model, corrected, architecture, base, rank, bits
):
    model, reference = load(corrected(architecture, base, rank, bits)), load(make_model(architecture))
    layers = stored_layers(model)
    for name, module in layers.items():
        assert (module.spec.format == "sum") is (rank > 0)
        assert module.spec.rank == rank
        layer = reference.get_submodule(name)
        weight, bias = dense_parts(module)
        layer.weight.data = weight.T if module.spec.conv1d else weight
        layer.bias = None if bias is None else torch.nn.Parameter(bias)
    assert len(layers) == {"llama": 21, "gpt2": 12, "qwen3": 21}[architecture]
    torch.testing.assert_close(logits(model, IDS), logits(reference, IDS), rtol=1e-3, atol=1e-3)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 23)


@pytest.mark.parametrize(("base", "rank", "bits"), CASES)
def test_save_pretrained_and_dequantize(corrected, tmp_path, base, rank, bits):
    model = load(corrected("gpt2", base, rank, bits))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), IDS), logits(model, IDS))
    dense = load(corrected("gpt2", base, rank, bits)).dequantize()
    assert not any(isinstance(module, StoredLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense, IDS), logits(model, IDS), rtol=1e-3, atol=1e-3)
    dense.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense"), IDS), logits(dense, IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("base", "rank", "bits"), CASES)
def test_codes_stay_codes_whatever_the_dtype_at_load(corrected, dtype, base, rank, bits):
    folder = corrected("llama", base, rank, bits, dtype="bfloat16")
    model, stored = load(folder, dtype=dtype), load_file(folder / "model.safetensors")
    for name, module in stored_layers(model).items():
        for key, tensor in module.state_dict().items():
            saved = stored[f"{name}.{key}"]
            assert tensor.dtype == (dtype if saved.is_floating_point() else torch.uint8)
            if not saved.is_floating_point():
                assert torch.equal(tensor, saved)
    assert torch.isfinite(logits(model, IDS)).all()


@pytest.mark.parametrize(("base", "rank", "bits"), CASES)
def test_offload_to_disk_and_device_map(corrected, tmp_path, base, rank, bits):
    layout = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}  # fmt: skip
    folder = corrected("llama", base, rank, bits)
    expected = logits(load(folder), IDS)
    torch.testing.assert_close(logits(load(folder, device_map="auto"), IDS), expected)
    torch.testing.assert_close(logits(load(folder, device_map=layout, offload_folder=str(tmp_path)), IDS), expected)


@pytest.mark.parametrize(("base", "rank", "bits"), CASES)
def test_what_is_no_code_trains(corrected, base, rank, bits):
    model = load(corrected("llama", base, rank, bits))
    model(input_ids=IDS, labels=IDS).loss.backward()
    for module in stored_layers(model).values():
        assert list(module.parameters())
        assert all(p.requires_grad and p.grad is not None for p in module.parameters())


def test_an_older_reader_stops_on_every_weight(corrected, tmp_path):
    """Without the manifest the load fails: the dense parameter's name holds an empty tensor."""
    for path in corrected().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"format": "quantized", "bits": 3, "group": -1}}, "groups of -1"),
        ({"base": 3}, "base 3"),
        ({"correction": {"format": "low_rank", "rank": 10**9, "bits": 16}}, "rank"),
    ],
)
def test_a_wrong_manifest_is_refused(corrected, tmp_path, change, message):
    for path in corrected().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
