"""What vLLM reads, kept until it is in layers; and what it has no place for, by the manifest alone."""

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.protocols import Spec
from lrcompress.vllm_plugin.tensors import Taken, holders, without_place

LENT = Spec("low_rank", (6, 4), parameters={"rank": 2})
SHARING = Spec("low_rank", (5, 4), parameters={"rank": 2, "shared": "a.q"})


def test_tensors_of_a_module_and_of_the_one_it_shares_with():
    taken = Taken({"a.q": LENT, "a.k": SHARING}, [])
    right, left, other = torch.randn(2, 4), torch.randn(6, 2), torch.randn(5, 2)
    taken.add("a.q", "A.weight", right)
    taken.add("a.q", "B.weight", left)
    taken.add("a.k", "B.weight", other)
    right.zero_()  # as where a file is read again into the same memory
    found = taken.tensors_of("a.k", SHARING, torch.float32)
    assert found.keys() == {"A.weight", "B.weight"}
    assert torch.equal(found["B.weight"], other)
    assert found["A.weight"].any()
    taken.drop(["a.q", "a.k"])
    assert taken.tensors_of("a.q", LENT, torch.float32)["A.weight"] is found["A.weight"]
    with pytest.raises(InputError, match=r"no tensor a\.k\.A\.weight: it is damaged"):
        Taken({"a.q": LENT, "a.k": SHARING}, []).tensors_of("a.k", SHARING, torch.float32)


def read_as(taken, name):
    """As vLLM's WeightsMapper does."""
    for pattern, new in taken.renamed.items():
        name = pattern.sub(new, name)
    return name


def test_experts_that_vllm_calls_otherwise():
    """transformers has a block's `mlp`, Mixtral's files and vLLM have `block_sparse_moe`; and their own projections."""
    at = "model.layers.1.mlp"
    shared, own = Spec("low_rank", (6, 4), parameters={"rank": 2}), Spec("quantized", (6, 4))
    taken = Taken({f"{at}.experts.3.up_proj": own, "model.layers.1.q_proj": shared}, [f"{at}.experts"])
    taken.map_names(lambda name: f"language_model.{name}")
    held, prefix = f"language_model.{at}.experts", "language_model.model.layers.1.block_sparse_moe.experts"
    assert taken.holders == {held: f"{at}.experts"}
    taken.rename(held, prefix)
    taken.rename_projections(prefix, {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
    assert taken.modules == {f"{prefix}.3.up_proj": own, "language_model.model.layers.1.q_proj": shared}
    new = "model.layers.1.block_sparse_moe"
    for name, wanted in {
        f"{at}.gate.weight": f"{new}.gate.weight",
        f"{at}.experts.3.up_proj.A.weight": f"{new}.experts.3.w3.A.weight",
        f"{at}.experts.gate_up_proj": f"{new}.experts.w13",
        f"{at}.experts.down_proj": f"{new}.experts.w2",
        "model.layers.11.mlp.up_proj.weight": "model.layers.11.mlp.up_proj.weight",
        f"{new}.experts.3.w3.weight": f"{new}.experts.3.w3.weight",
    }.items():
        assert read_as(taken, name) == wanted
    with pytest.raises(InputError, match=r"holds experts, which vLLM looks for in a\.1\.b\.c\.experts"):
        taken.rename(held, "a.1.b.c.experts")


def test_experts_under_their_own_names_are_read_as_they_are():
    taken = Taken({}, ["a.1.mlp.experts"])
    taken.rename("a.1.mlp.experts", "a.1.mlp.experts")
    taken.rename_projections("a.1.mlp.experts", {})
    assert not taken.renamed
    names = ["a.1.mlp.experts.0.up_proj.weight", "a.2.x.experts.gate_up_proj", "a.2.mlp.gate.weight"]
    assert holders(names) == {"a.1.mlp.experts", "a.2.x.experts"}


PLACES = {
    "embeddings": ({"embed": Spec("table", (8, 4))}, []),
    "Conv1D": ({"c_attn": Spec("low_rank", (8, 4), conv1d=True)}, []),
    "experts with biases": ({"mlp.experts.0.up": Spec("low_rank", (8, 4), bias=True)}, ["mlp.experts"]),
    None: (
        {"mlp.experts.0.up": LENT, "mlp.up": Spec("low_rank", (8, 4), bias=True, added_bias=True)},
        ["mlp.experts"],
    ),
}


@pytest.mark.parametrize("words", PLACES)
def test_what_vllm_cannot_load(words):
    modules, experts = PLACES[words]
    found = without_place(modules, experts)
    assert (found is None) == (words is None)
    assert found is None or (words in found[1] and found[0] in modules)
