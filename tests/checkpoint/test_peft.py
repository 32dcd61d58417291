"""PEFT over compressed checkpoints: adapters on stored layers and on their factors."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lrcompress.errors import InputError
from lrcompress.model.surgery import stored_layers
from tests.checkpoint.test_loading import IDS, load, logits

# what to compress with, and the format that comes out
STORED = {
    "low_rank": {"method": "lord", "format": "low_rank"},
    "pivoted": {"method": "lord", "format": "pivoted"},
    "quantized": {"method": "eora", "base": "rtn:3:16", "rank": 0, "ratio": None},
    "semi_sparse": {"method": "eora", "base": "magnitude:2:4", "rank": 0, "ratio": None},
    "sum": {"method": "eora", "base": "rtn:3:16", "rank": 2, "ratio": None},
    "coded": {"method": {"name": "ecsq", "metric": "input"}, "bpw": 4, "ratio": None},
}


@pytest.fixture
def stored(compressed):
    return lambda form: compressed(**STORED[form])


def train(model):
    """A few steps on IDS; the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def adapted(model):
    """Names of the modules that have an adapter, without their block."""
    return {n.split("layers.1.")[1].partition(".lora_A")[0] for n, _ in model.named_parameters()
            if "layers.1." in n and ".lora_A." in n}  # fmt: skip


@pytest.mark.parametrize("form", ["quantized", "semi_sparse", "coded"])
def test_adapters_train_over_a_frozen_compressed_base(stored, tmp_path, form):
    """As in QLoRA: PEFT takes the stored layers for linear ones, gradients reach the adapters and nothing else."""
    model = load(stored(form))
    before, tensors = logits(model, IDS), {k: t.clone() for k, t in model.state_dict().items()}
    config = LoraConfig(target_modules=["up_proj", "q_proj"], r=2, lora_alpha=4, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    assert adapted(model) == {"mlp.up_proj", "self_attn.q_proj"}
    torch.testing.assert_close(logits(model, IDS), before)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert all((p.grad is not None) is ("lora_" in n) for n, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(stored(form)), tmp_path)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS))
    assert all(torch.equal(t, tensors[k]) for k, t in model.unload().state_dict().items())


@pytest.mark.parametrize(
    ("form", "inner"),
    [("low_rank", ["A", "B"]), ("pivoted", ["pivot", "rest"]), ("sum", ["A", "B"])],
)
def test_adapters_train_on_factors(stored, form, inner):
    model = load(stored(form))
    before = logits(model, IDS)
    model = get_peft_model(model, LoraConfig(target_modules=inner, r=2, lora_alpha=4, task_type="CAUSAL_LM"))
    assert {name.rpartition(".")[2] for name in adapted(model)} == set(inner)
    torch.testing.assert_close(logits(model, IDS), before)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("form", "inner"),
    [
        ("low_rank", {"A", "B"}),
        ("pivoted", {"pivot", "rest"}),
        ("sum", {"A", "B", "base"}),
        ("quantized", {"up_proj"}),
        ("coded", {"up_proj"}),
    ],
)
def test_all_linear_finds_the_innermost_layers(stored, form, inner):
    config = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    model = get_peft_model(load(stored(form)), config)
    assert {name.rpartition(".")[2] for name in adapted(model) if "up_proj" in name} == inner
    train(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_takes_device_and_dtype_of_the_stored_layer(stored, dtype):
    config = LoraConfig(target_modules=["up_proj"], r=2, task_type="CAUSAL_LM")
    model = get_peft_model(load(stored("quantized"), dtype=dtype), config, autocast_adapter_dtype=False)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.lora_A["default"].weight.dtype == layer.base_layer.weight.dtype == dtype
    assert torch.isfinite(logits(model, IDS)).all()


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_is_refused_in_words_and_works_on_the_dense_model(stored, tmp_path, safe_merge):
    config = LoraConfig(target_modules=["up_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load(stored("quantized")), config)
    model.save_pretrained(tmp_path)
    expected = logits(model, IDS)
    with pytest.raises(InputError, match="dequantize"):
        model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model, IDS), expected)
    dense = PeftModel.from_pretrained(load(stored("quantized")).dequantize(), tmp_path)
    merged = dense.merge_and_unload(safe_merge=safe_merge)
    assert not stored_layers(merged)
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-4)
