"""GGUF files written here, tensor by tensor: every one of them is read, or the file is refused."""

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from lrcompress.checkpoint.opening import open_dense
from lrcompress.errors import InputError
from tests.checkpoint.test_loading import load

HEADS, KEY_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(array, heads):
    """Rows of queries or keys in llama.cpp's order: the halves of a head by turns."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def gguf_name(name):
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        if name.startswith(ours):
            return name.replace(ours, theirs)
    block, rest = name.removeprefix("model.layers.").split(".", 1)
    kind, _, leaf = rest.rpartition(".")
    return f"blk.{block}.{NAMES[kind]}.{leaf}"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(bias, extra): the file of a random Llama, and that model."""
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))

    def run(bias, extra=None, width=32, tokens=256):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS, vocab_size=256, max_position_embeddings=64, tie_word_embeddings=False,
            attention_bias=bias, mlp_bias=bias,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        path = tmp_path / "model.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(width)
        writer.add_block_count(2)
        writer.add_feed_forward_length(48)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KEY_HEADS)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(256)
        writer.add_tokenizer_model("gpt2")
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
        writer.add_token_list([*pieces[:-1], "ab"][:tokens])
        writer.add_token_types([1] * 256)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        for name, tensor in model.state_dict().items():
            array = tensor.numpy().astype(np.float32)
            heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else None
            writer.add_tensor(gguf_name(name), array if heads is None else interleaved(array, heads))
        if extra is not None:
            writer.add_tensor(extra, np.ones(4, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, model

    return run


@pytest.mark.parametrize("bias", [False, True])
def test_every_tensor_is_read(write, bias):
    path, model = write(bias)
    folder = open_dense(str(path)).folder
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(folder)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"width": 64}, {"width": 48}, {"tokens": 100}])
def test_a_file_that_contradicts_itself_is_refused(write, wrong):
    path, _ = write(False, **wrong)
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        open_dense(str(path))


def test_a_tensor_without_a_place_is_refused(write):
    path, _ = write(False, extra="blk.1.attn_sinks.weight")
    with pytest.raises(InputError, match=r"attn_sinks.*no place"):
        open_dense(str(path))
