"""Parts of stored weights against slices of the dense weight; vLLM itself runs them in tests/serve."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from lrcompress.formats import FORMATS, StoredLinear, restored
from lrcompress.vllm_plugin.shards import Cut, dense_linear, shard
from tests.contract.test_formats import ALL, example

ROWS = {
    "some rows": torch.arange(8, 20),
    "rows of three parts": torch.arange(24).reshape(3, 8)[:, 4:].flatten(),
    "fewer rows than components": torch.arange(8, 14),
}


def part_of(name, shape, cut, bias=True):
    spec, stored, *_ = example(name, shape, 11, bias)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1))
    return spec, restored(spec, stored, torch.float32), shard(spec, stored, cut, torch.float32), x


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("name", ALL)
def test_rows(name, shape, rows):
    _, whole, part, x = part_of(name, shape, Cut(rows=rows))
    torch.testing.assert_close(part(x), whole(x)[:, rows], rtol=1e-4, atol=1e-4)
    if isinstance(part, StoredLinear) and name not in ("pivoted",):
        assert torch.equal(part.dense(), whole.dense()[rows]) or name.startswith(("low_rank", "sum"))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", [(40, 24), (30, 36)])
@pytest.mark.parametrize("name", ALL)
def test_columns_of_all_processes_sum_up(name, shape, count):
    """The bias is one process's; groups of 5 and 7 inputs are divided."""
    width = shape[1] // count
    cuts = [Cut(columns=(i * width, (i + 1) * width), first=i == 0) for i in range(count)]
    found = 0
    for cut in cuts:
        _, whole, part, x = part_of(name, shape, cut)
        found = found + part(cut.of_columns(x))
    torch.testing.assert_close(found, whole(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["quantized", "coded", "semi_sparse", "sum 8 of quantized"])
def test_integers_stay_integers(name):
    """No number changes, and nothing is multiplied out; 2:4 weights where fours stay whole."""
    spec, whole, part, _ = part_of(name, (24, 40), Cut(rows=torch.arange(6, 18)))
    assert part.spec.format == spec.format
    assert sum(t.nbytes for t in part.state_dict().values()) < 0.75 * sum(t.nbytes for t in whole.state_dict().values())
    _, whole, part, _ = part_of(name, (24, 40), Cut(columns=(8, 20)))
    assert part.spec.format == spec.format
    torch.testing.assert_close(part.dense(), whole.dense()[:, 8:20], rtol=0, atol=1e-6)
    assert part_of("semi_sparse", (24, 40), Cut(columns=(10, 20)))[2].__class__ is torch.nn.Linear


@pytest.mark.parametrize("name", ALL)
def test_the_whole_is_the_format_itself(name):
    spec, whole, part, x = part_of(name, (24, 40), None)
    assert part.spec == spec
    assert isinstance(part, FORMATS.get(spec.format))
    torch.testing.assert_close(part(x), whole(x), rtol=1e-5, atol=1e-5)


def test_a_dense_shard():
    weight, bias = torch.randn(6, 4), torch.randn(6)
    x = torch.randn(3, 4)
    torch.testing.assert_close(dense_linear(weight.T.contiguous().T, bias)(x), x @ weight.T + bias)


def test_vllm_finds_the_plugin_and_what_it_needs_is_not_transformers():
    """vLLM holds transformers back: nothing on the plugin's way may import it."""
    found = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "lrcompress"]
    assert not found or found[0].value == "lrcompress.vllm_plugin:register"
    code = (
        "import sys, lrcompress.vllm_plugin, lrcompress.vllm_plugin.shards, lrcompress.checkpoint.manifest\n"
        "assert not {'transformers', 'accelerate', 'lm_eval', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
