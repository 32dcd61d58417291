"""Dense checkpoints from compressed ones: the same logits, every other bit untouched, no lrcompress to load them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lrcompress.checkpoint.manifest import read_manifest
from lrcompress.errors import InputError
from lrcompress.export.dense import export_dense
from lrcompress.model.surgery import stored_layers
from lrcompress.report.inspection import inspect_model
from tests.checkpoint.test_loading import IDS, load, logits
from tests.conftest import run_without_lrcompress

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""In float32 W x with W = B A multiplied out differs from B (A x) by rounding only; the logits are of size 10."""


def eora(base, bits, rank=2):
    return {"method": {"name": "eora", "factor_bits": bits}, "base": base, "rank": rank, "ratio": None}


RECIPES = {
    "low_rank": {"method": {"name": "lord", "metric": "input"}, "format": "low_rank"},
    "pivoted": {"method": {"name": "lord", "metric": "input"}, "format": "pivoted"},
    "mixed with dense": {"method": "welore"},
    "sparse_dictionary": {"method": "cospadi"},
    "shared dictionaries": {"method": {"name": "cospadi", "group": 2}},
    "transposed_dictionary": {"method": {"name": "cospadi", "side": "input"}},
    "quantized": eora("rtn:3:16", 16, rank=0),
    "semi_sparse": eora("magnitude:2:4", 16, rank=0),
    "sum of 16 bits": eora("rtn:3:16", 16),
    "sum of 8 bits": eora("gptq:4:7", 8),
    "sum of 4 bits": eora("wanda:2:4", 4),
}


@pytest.fixture
def export(tmp_path):
    def run(folder, **options):
        result = export_dense(str(folder), tmp_path / "dense", **options)
        assert [p.name for p in tmp_path.iterdir()] == ["dense"]
        return tmp_path / "dense", result

    return run


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_those_of_the_compressed_model(compressed, export, architecture, recipe):
    source = compressed(architecture, **RECIPES[recipe])
    compressed_model = load(source)
    folder, result = export(source)
    model = load(folder)
    assert not stored_layers(model)
    assert result["layers"] == len(stored_layers(compressed_model))
    torch.testing.assert_close(logits(model, IDS), logits(compressed_model, IDS), **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox"])
def test_added_biases_get_the_slots_that_the_config_offers(compressed, make_model, export, architecture):
    """Llama has none but two switches for them; GPT-2, OPT and GPT-NeoX have had biases all along."""
    source = compressed(architecture, method="lord")
    folder, result = export(source)
    assert result["switches"] == (["attention_bias", "mlp_bias"] if architecture == "llama" else [])
    torch.testing.assert_close(logits(load(folder), IDS), logits(load(source), IDS), **CLOSE)
    config, before = (json.loads((f / "config.json").read_text()) for f in (folder, make_model(architecture)))
    assert {k for k in config if config[k] != before.get(k)} == set(result["switches"])


def test_slots_without_a_bias_are_filled_with_zeros(compressed, export):
    source = compressed(method="lord", target=["*.q_proj"])
    folder, result = export(source)
    assert result["switches"] == ["attention_bias"]
    biases = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.endswith(".bias")}
    assert len(biases) == 12
    assert all(bool(t.any()) is ("q_proj" in n) for n, t in biases.items())
    torch.testing.assert_close(logits(load(folder), IDS), logits(load(source), IDS), **CLOSE)


def test_added_biases_without_a_slot_are_refused(compressed, tmp_path):
    """Qwen3 has a switch for its attention, none for its MLP."""
    with pytest.raises(InputError, match="9 of the biases .* dense qwen3 .*mlp.*metric=input"):
        export_dense(str(compressed("qwen3", method="lord")), tmp_path / "dense")
    assert not list(tmp_path.iterdir())
    source = compressed("qwen3", method="lord", target=["*.self_attn.*"])
    assert export_dense(str(source), tmp_path / "dense")["switches"] == ["attention_bias"]
    torch.testing.assert_close(logits(load(tmp_path / "dense"), IDS), logits(load(source), IDS), **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_else_is_kept_bit_for_bit(compressed, make_model, export, architecture, dtype):
    source = compressed(architecture, **RECIPES["sum of 16 bits"], dtype=dtype)
    folder, result = export(source)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    modules = read_manifest(source).modules
    assert result["dtype"] == dtype
    assert after.keys() == load_file(make_model(architecture) / "model.safetensors").keys()
    for name, tensor in after.items():
        assert tensor.dtype == getattr(torch, dtype)
        if name.rpartition(".")[0] not in modules or name.endswith(".bias"):
            assert torch.equal(tensor, before[name])
    model = load(folder)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is (architecture != "llama")


MIXTURES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba"]


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_names_are_those_that_transformers_gives_to_files(compressed, make_model, export, architecture, some):
    """Other readers know no others: experts one by one where they are so, whether compressed or not."""
    options = {"ignore": ["*experts*"]} if some else {}
    source = compressed(architecture, method={"name": "lord", "metric": "input"}, **options)
    folder, _ = export(source)
    found, wanted = (load_file(f / "model.safetensors") for f in (folder, make_model(architecture)))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}
    torch.testing.assert_close(logits(load(folder), IDS), logits(load(source), IDS), **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(compressed, export, dtype):
    source = compressed(**RECIPES["quantized"])
    folder, result = export(source, dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    assert json.loads((folder / "config.json").read_text())["dtype"] == result["dtype"] == dtype
    for name, module in stored_layers(load(source)).items():
        assert torch.equal(stored[f"{name}.weight"], module.dense().to(getattr(torch, dtype)))


def test_a_weight_beyond_the_dtype_is_refused(compressed, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in compressed(**RECIPES["low_rank"]).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for key in "AB":
        tensors[f"model.layers.1.mlp.up_proj.{key}.weight"] *= 1000
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj does not fit into torch.float16.*--dtype"):
        export_dense(str(source), tmp_path / "dense", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    export_dense(str(source), tmp_path / "dense")


def test_in_shards_with_side_files_and_a_report(compressed, export):
    source = compressed(**RECIPES["mixed with dense"])
    folder, _ = export(source, shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    torch.testing.assert_close(logits(load(folder), IDS), logits(load(source), IDS), **CLOSE)
    assert AutoTokenizer.from_pretrained(folder)("a b") == AutoTokenizer.from_pretrained(source)("a b")
    report, before = (json.loads((f / "report.json").read_text()) for f in (folder, source))
    assert report["bytes"] == inspect_model(str(folder))["bytes"]
    assert report["ratio"]["stored"] == report["ratio"]["whole_model"] == 0
    assert {t["format"] for t in report["targets"]} == {"dense"}
    assert [t["relative_error"] for t in report["targets"]] == [t["relative_error"] for t in before["targets"]]
    assert report["calibration"] == before["calibration"]
    assert not {"plan.json", "recipe.yaml"} & {p.name for p in folder.iterdir()}
    assert "loads without lrcompress" in (folder / "README.md").read_text()


def test_it_loads_without_lrcompress(compressed, export):
    folder, _ = export(compressed(**RECIPES["pivoted"]))
    code = """
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
print(sum(map(len, info.values())), type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = run_without_lrcompress(code, folder)
    assert done.stdout.split() == ["0", "Linear"], done.stderr


def test_the_models_class_is_named_where_its_source_had_no_name(compressed, export, tmp_path_factory):
    """As a config that comes from GGUF: converters go by that name."""
    source = shutil.copytree(
        compressed("llama", method={"name": "lord", "metric": "input"}), tmp_path_factory.mktemp("s") / "m"
    )
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    folder, _ = export(source)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_dense_model_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match="not compressed by lrcompress"):
        export_dense(str(llama), tmp_path / "dense")
    assert not list(tmp_path.iterdir())
