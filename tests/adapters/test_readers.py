"""What we write, through the scale rule of every reader of adapters (docs/serving.md): all find the same update."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lrcompress.adapters.extract import extract
from lrcompress.adapters.merge import Room, merge
from lrcompress.adapters.squeeze import Amount, squeeze
from lrcompress.errors import InputError
from lrcompress.export.peft import export_peft
from tests.adapters.conftest import deltas
from tests.commands import run_cli
from tests.conftest import compress_tiny

CONFIG = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 5},
    "alpha_pattern": {"v_proj": 3},
    "use_rslora": True,
}


def squeezed(make_adapter, llama, folder):
    squeeze(str(make_adapter(**CONFIG)), folder, Amount(rank=6), dtype="bfloat16")


def extracted(make_adapter, llama, folder):
    merge([str(make_adapter(seed, **CONFIG)) for seed in range(2)], folder / "shared", Room(error=0.1))
    extract(str(folder / "shared"), "adapter-1", folder / "out")


def corrections(make_adapter, llama, folder):
    method = {"name": "eora", "metric": "plain"}
    compress_tiny(llama, folder / "eora", method=method, base="rtn:2:16", ratio=0.6)
    export_peft(str(folder / "eora"), folder / "out", dtype="bfloat16")


def files(folder):
    folder = folder / "out" if (folder / "out").is_dir() else folder
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for name, right in tensors.items():
        if name.endswith("lora_A.weight"):
            found[name.removesuffix(".lora_A.weight")] = right, tensors[name.replace("lora_A", "lora_B")]
    assert len(tensors) == 2 * len(found)
    return json.loads((folder / "adapter_config.json").read_text()), found


READERS = {
    "SGLang": lambda config, rank: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, rank: config["lora_alpha"] / rank if config["lora_alpha"] else 1.0,
    "GPTQModel": lambda config, rank: 1.0 if rank == config["r"] else None,
    "OpenVINO": lambda config, rank: config["lora_alpha"] / rank,
    "vLLM": lambda config, rank: (
        config["lora_alpha"] / config["r"] / (config["r"] ** 0.5 if config["use_rslora"] else 1)
    ),
}


@pytest.mark.parametrize("make", [squeezed, extracted, corrections])
def test_every_reader_scales_by_one(make_adapter, llama, tmp_path, make):
    make(make_adapter, llama, tmp_path / "a")
    config, modules = files(tmp_path / "a")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert {right.shape[0] for right, _ in modules.values()} == {left.shape[1] for _, left in modules.values()}
    assert make is squeezed or config["r"] % 8 == 0
    for right, left in modules.values():
        assert right.shape[0] == config["r"]
        assert right.dtype == left.dtype == (torch.float32 if make is extracted else torch.bfloat16)
        for name, scale in READERS.items():
            assert scale(config, right.shape[0]) == 1.0, name


@pytest.mark.parametrize("amount", [Amount(rank=6), Amount(ratio=0.4), Amount(error=0.2)])
def test_one_rank_is_what_was_asked_for(make_adapter, load_adapter, tmp_path, amount):
    """Bytes, padding included, within the ratio, and the least rank within the error: by SVDs of the dense updates."""
    source, out = make_adapter(**CONFIG), tmp_path / "out"
    report = squeeze(str(source), out, amount)
    config, modules = files(out)
    before, after = deltas(load_adapter(source)), deltas(load_adapter(out))
    rank, sizes = (
        config["r"],
        [sum(t.nbytes for t in load_file(f / "adapter_model.safetensors").values()) for f in (source, out)],
    )
    assert report["bytes"] == {"before": sizes[0], "after": sizes[1], "carried": 0}
    values = {name: torch.linalg.svdvals(update).square() for name, update in before.items()}
    lost = [sum(float(v[r:].sum()) for v in values.values()) for r in range(10)]
    total = sum(float(v.sum()) for v in values.values())
    assert sum(float((before[n] - after[n]).square().sum()) for n in before) == pytest.approx(lost[rank], rel=1e-4)
    if amount.ratio is not None:
        assert sizes[1] <= 0.6 * sizes[0] < sizes[1] * (rank + 1) / rank
    elif amount.error is not None:
        assert lost[rank] <= 0.04 * total < lost[rank - 1]
    else:
        assert rank == 6
    assert modules["base_model.model.model.layers.1.self_attn.q_proj"][0].shape[0] == rank


def test_what_is_no_linear_layers_gets_the_same_rank_and_scaling(make_adapter, load_adapter, tmp_path):
    from tests.adapters.conftest import embedding_delta

    config = {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 3},
              "alpha_pattern": {"embed_tokens": 5}}  # fmt: skip
    source, out = make_adapter(**config), tmp_path / "out"
    squeeze(str(source), out, Amount(rank=6))
    assert embedding_delta(load_adapter(source)).any()
    torch.testing.assert_close(embedding_delta(load_adapter(out)), embedding_delta(load_adapter(source)))
    assert json.loads((out / "adapter_config.json").read_text())["rank_pattern"] == {}
    with pytest.raises(InputError, match=r"embed_tokens in .* keeps its rank 3.*--per-module-ranks"):
        squeeze(str(source), tmp_path / "small", Amount(rank=2))
    assert not (tmp_path / "small").exists()


def test_ranks_of_their_own_take_no_more_bytes(make_adapter, tmp_path):
    source = make_adapter(**CONFIG)
    sizes = []
    for flags in ([], ["--per-module-ranks"]):
        done = run_cli("squeeze", source, "--error", 0.2, "-o", tmp_path / f"out{len(flags)}", *flags)
        assert done.returncode == 0, done.stderr
        sizes.append((tmp_path / f"out{len(flags)}/adapter_model.safetensors").stat().st_size)
    assert sizes[1] < sizes[0]
    assert json.loads((tmp_path / "out1/adapter_config.json").read_text())["rank_pattern"]
    done = run_cli("squeeze", source, "--rank", 2, "-o", tmp_path / "out", "--dtype", "float16")
    assert (done.returncode, "one of auto, float32, bfloat16" in done.stderr) == (2, True)
