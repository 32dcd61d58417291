"""Keys and tables of a GGUF file that change what is computed: the model is the one that they describe, or none.

The models meant are transformers' own, given the same numbers by its config; the files have what llama.cpp's converter
writes for such a model.
"""

import math

import numpy as np
import pytest
import torch
import transformers as t
from packaging.version import Version

from lrcompress.errors import InputError
from lrcompress.foreign.gguf_metadata import Metadata, settle
from lrcompress.foreign.opening import open_dense
from tests.foreign.gguf_files import KEYS, SIZES, random_model, tensors_of, unchanged, write_file
from tests.foreign.test_gguf import LLAMA, agree

WIDE = {"hidden_size": 128, "num_key_value_heads": 2}
WIDE_KEYS = {"embedding_length": 128}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
EXTREMES = {"low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path):
    """llama(rope, keys, tables, sizes): a file with these keys and tables, and the Llama with these rope_parameters."""

    def run(rope, keys, tables=None, sizes=None, common=None):
        model = random_model(
            t.LlamaConfig(**{**SIZES, **(sizes or {})}, rope_parameters={"rope_theta": 10000.0, **rope})
        )
        tensors = tensors_of(model, "llama", LLAMA) | (tables or {})
        keys = {**KEYS, "rope.freq_base": model.config.rope_parameters["rope_theta"], **keys}
        return write_file(tmp_path / "model.gguf", "llama", keys, tensors, common or {}), model

    return run


def table(rope, width):
    """As llama.cpp's converter computes rope_freqs.weight (conversion/llama.py), in its words."""
    found = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / width)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found)


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        ({"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
        ({"rope_type": "default", "rope_theta": 10000.0}, {"rope.freq_base": None}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0,
             "beta_slow": 2.0, "attention_factor": 1.3},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
             "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_attn_factor": 1.3,
             "rope.scaling.yarn_ext_factor": 1.0},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0,
             "mscale_all_dim": 0.5},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
             "rope.scaling.yarn_log_multiplier": 0.5},
        ),
    ],
)  # fmt: skip
def test_scaling_keys(llama, rope, keys):
    agree(*llama(rope, {**WIDE_KEYS, **keys}, sizes=WIDE))


def test_the_table_of_llama_3_is_known_by_its_name(llama):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, **LLAMA3}
    path, model = llama(rope, WIDE_KEYS, {"rope_freqs.weight": table(rope, 32)}, WIDE)
    agree(path, model)
    assert t.AutoConfig.from_pretrained(open_dense(str(path)).folder).rope_parameters == rope


def test_any_other_table_is_kept_as_it_is(llama):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 6.0, **EXTREMES}
    agree(*llama(rope, WIDE_KEYS, {"rope_freqs.weight": table(rope, 32)}, WIDE))


@pytest.mark.parametrize("tokens", [60, 100])
def test_tables_for_short_and_for_long_texts(llama, tokens):
    short, long = np.array([1.0, 1.1, 1.2, 1.5]), np.array([1.0, 2.0, 3.0, 4.0])
    rope = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(), "factor": 2.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    factor = math.sqrt(1 + math.log(2) / math.log(64))
    keys = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": factor}
    tables = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    agree(*llama(rope, keys, tables), tokens=tokens)


def test_a_table_without_its_counterpart_or_of_another_length(llama):
    for name, size, said in [("rope_factors_long", 4, "counterpart"), ("rope_freqs", 3, "does not fit")]:
        path, _ = llama({"rope_type": "default"}, {}, {f"{name}.weight": np.ones(size) * 2})
        with pytest.raises(InputError, match=said):
            open_dense(str(path))


def raised(name, array):
    """Norms as Gemma and Nemotron have them in GGUF: one more."""
    return {name: array + 1 if name.endswith("norm.weight") else array}


GEMMA = {"head_dim": 16, "sliding_window": 16}
GEMMA_KEYS = {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 16}
LAYERNORM = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-3}


@pytest.mark.parametrize(
    ("architecture", "config", "keys", "change"),
    [
        ("qwen3", t.Qwen3Config(**SIZES, head_dim=16), {"attention.key_length": 16, "attention.value_length": 16}, unchanged),
        (
            "starcoder2",
            t.Starcoder2Config(**SIZES, norm_epsilon=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 99999.0}),
            {**LAYERNORM, "rope.freq_base": 99999.0},
            unchanged,
        ),
        (
            "stablelm",
            t.StableLmConfig(
                **SIZES, use_qkv_bias=True, layer_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            ),
            {**LAYERNORM, "rope.dimension_count": 4, "use_parallel_residual": False},
            unchanged,
        ),
        (
            "nemotron",
            t.NemotronConfig(
                **SIZES, norm_eps=1e-3,
                rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
            ),
            {**LAYERNORM, "rope.dimension_count": 4, "rope.freq_base": 20000.0, "rope.scaling.type": "linear",
             "rope.scaling.factor": 4.0},
            raised,
        ),
        (
            "phi3",
            t.Phi3Config(
                **SIZES, rms_norm_eps=1e-6, original_max_position_embeddings=128, sliding_window=16,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
            ),
            {"rope.dimension_count": 6, "rope.scaling.original_context_length": 128, "attention.sliding_window": 16},
            unchanged,
        ),
        (
            "gemma2",
            t.Gemma2Config(
                **SIZES, **GEMMA, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
            ),
            {**GEMMA_KEYS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
            raised,
        ),
        (
            "gemma3",
            t.Gemma3TextConfig(
                **{**SIZES, "num_hidden_layers": 7}, **GEMMA, query_pre_attn_scalar=16,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                },
            ),
            {**GEMMA_KEYS, "block_count": 7, "rope.freq_base": 1e6, "rope.freq_base_swa": 5000.0,
             "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            raised,
        ),
        (
            "gemma3",
            t.Gemma3TextConfig(
                **SIZES, **GEMMA, query_pre_attn_scalar=16, layer_types=["full_attention", "sliding_attention"]
            ),
            {**GEMMA_KEYS, "rope.freq_base": 1e6, "attention.sliding_window_pattern": [False, True]},
            raised,
        ),
        (
            "gemma3",
            t.Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=4, layer_types=["full_attention"] * 2),
            {**GEMMA_KEYS, "rope.freq_base": 1e6, "attention.sliding_window": None, "attention.scale": 0.5},
            raised,
        ),
        (
            "gpt2",
            t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=40, n_positions=128, vocab_size=256, bos_token_id=0,
                         eos_token_id=0, layer_norm_epsilon=1e-3),
            {**LAYERNORM, "feed_forward_length": 40, "attention.head_count_kv": None, "rope.freq_base": None,
             "vocab_size": None},
            lambda name, array: {name: array.T if "c_" in name and array.ndim == 2 else array},
        ),
    ],
)  # fmt: skip
def test_what_transformers_drops_is_read(tmp_path, architecture, config, keys, change):
    model = random_model(config)
    if change is raised:
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data.sub_(1)
    path = write_file(tmp_path / "m.gguf", architecture, {**KEYS, **keys}, tensors_of(model, architecture, change))
    agree(path, model)


@pytest.mark.parametrize(
    ("blocks", "heads", "width", "head", "meant"),
    [(26, 8, 2304, 256, 256), (42, 16, 3584, 256, 256), (46, 32, 4608, 128, 144), (62, 32, 5376, 128, 168)],
)
def test_the_scalar_of_attention_that_has_no_key(tmp_path, blocks, heads, width, head, meant):
    """query_pre_attn_scalar of Gemma 2 2B, 9B, 27B and Gemma 3 27B, as their config.json on the hub has it."""
    config = t.Gemma2Config(num_hidden_layers=blocks, num_attention_heads=heads, hidden_size=width, head_dim=head)
    settle(config, Metadata(tmp_path, "gemma2", {"attention.value_length": head}, {}))
    assert config.query_pre_attn_scalar == meant


@pytest.mark.parametrize(
    "keys",
    [
        {"logit_scale": 0.5}, {"residual_scale": 0.5}, {"embedding_scale": 2.0}, {"attention.scale": 0.1},
        {"attention.clamp_kqv": 8.0}, {"attention.max_alibi_bias": 8.0}, {"attention.causal": False},
        {"attention.sliding_window": 16}, {"attention.sliding_window_pattern": 2}, {"attention.temperature_scale": 0.1},
        {"attn_logit_softcapping": 50.0}, {"final_logit_softcapping": 30.0}, {"attention.value_length": 16},
        {"use_parallel_residual": True}, {"nextn_predict_layers": 1}, {"expert_count": 4}, {"expert_gating_func": 2},
        {"rope.scaling.alpha": 1000.0}, {"rope.dimension_sections": [1, 1, 2, 0]}, {"rope.freq_base_swa": 5000.0},
        {"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, {"rope.of_tomorrow": 1}, {"of_tomorrow": "x"},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_ext_factor": 0.5},
    ],
    ids=lambda keys: "-".join(keys),
)  # fmt: skip
def test_what_the_model_has_no_place_for_is_refused(llama, keys):
    path, _ = llama({"rope_type": "default"}, keys)
    with pytest.raises(InputError, match=rf"llama\.({'|'.join(keys)}) = .*: start from its safetensors"):
        open_dense(str(path))


def test_keys_that_change_nothing_are_no_reason(llama):
    said = {
        "logit_scale": 1.0, "residual_scale": 0.0, "attention.scale": 8**-0.5, "attention.clamp_kqv": 0.0,
        "attention.causal": True, "attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8,
        "use_parallel_residual": False, "expert_count": 0, "expert_used_count": 0, "expert_gating_func": 1,
        "rope.dimension_sections": [0, 0, 0, 0], "rope.scaling.finetuned": True, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0, "rope.freq_base_swa": 10000.0, "pooling_type": 3,
        "tensor_data_layout": "Meta AI original pth", "attention.sliding_window": 0,
    }  # fmt: skip
    agree(*llama({"rope_type": "default"}, said, common={"general.type": "model", "quantize.imatrix.chunks_count": 9}))


@pytest.mark.skipif(Version(t.__version__) < Version("5.19"), reason="transformers 5.16 has no tokenizer for it")
def test_a_window_of_which_the_file_says_nothing(llama):
    """A class of models has one by itself; the file's model, called so by its name alone, has none."""
    path, model = llama({"rope_type": "default"}, {}, common={"general.name": "mistral"})
    agree(path, model)
    config = t.AutoConfig.from_pretrained(open_dense(str(path)).folder)
    assert type(config)().sliding_window
    assert config.sliding_window is None


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_file_that_is_no_model_says_so(llama, kind):
    path, _ = llama({"rope_type": "default"}, {}, common={"general.type": kind})
    with pytest.raises(InputError, match=rf"holds no model but {kind}"):
        open_dense(str(path))


def test_every_rotary_embedding_is_the_one_of_the_file(llama, monkeypatch):
    """Where transformers' model does not take what the config says, that is no reason to go on with another one."""
    path, _ = llama({"rope_type": "default"}, {"rope.scaling.factor": 4.0})
    monkeypatch.setattr("lrcompress.foreign.gguf.empty_model", lambda config: random_model(t.LlamaConfig(**SIZES)))
    with pytest.raises(InputError, match=r"rotary embedding that transformers' LlamaForCausalLM cannot be given"):
        open_dense(str(path))


def test_random_models_differ_by_their_rotation():
    """Else the tests above would compare nothing."""
    ids, found = torch.arange(60)[None], []
    for factor in (1.0, 4.0):
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}
        found.append(random_model(t.LlamaConfig(**SIZES, rope_parameters=rope))(ids).logits)
    assert torch.linalg.norm(found[0] - found[1]) > 0.1 * torch.linalg.norm(found[0])
