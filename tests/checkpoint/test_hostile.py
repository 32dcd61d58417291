"""Files that nobody honest writes: each is refused in words, whatever it says, and quickly.

tests/corpus holds cases that were thought of or once found; hypothesis looks for others.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint.folder import load_tokenizer, read_sound_config
from lrcompress.checkpoint.manifest import Manifest
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError, LrcompressError
from lrcompress.evaluation.compare import evaluate
from lrcompress.export.dense import export_dense
from lrcompress.foreign.opening import OpenedModel, refuse_compressed
from lrcompress.formats import stored_tensors
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.skeleton import check_sizes, empty_model, find_blocks
from lrcompress.model.targets import find_sites
from lrcompress.pipeline import compress
from lrcompress.recipe import EvaluateSpec, make_recipe
from lrcompress.report.inspection import inspect_model
from tests.conftest import compress_tiny

CORPUS = Path(__file__).parent.parent / "corpus"
FUZZ = settings(deadline=None, max_examples=40, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip

junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=9)
    | st.sampled_from(["../x.safetensors", "/etc/passwd", "F32", "low_rank", "silu", -1, 0, 2**31, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def corpus(kind):
    return pytest.mark.parametrize("case", sorted((CORPUS / kind).iterdir()), ids=lambda path: path.stem)


def read_shards(folder):
    reader = CheckpointReader(folder)
    return list(reader.read(reader.names()))


def open_as_compress_does(folder):
    """Everything that a compression reads of a folder before its text."""
    refuse_compressed(OpenedModel(str(folder), folder, "x"))
    reader = CheckpointReader(folder)
    model = empty_model(read_sound_config(folder))
    find_sites(model, find_blocks(model), [], [])
    walker = BlockWalker(model, reader, torch.device("cpu"), torch.float32)
    return walker


def build(manifest):
    """What a manifest says, as far as meta tensors go."""
    for spec in Manifest.from_json(manifest).modules.values():
        assert spec.rank >= 0
        stored_tensors(spec.alone(), torch.float32)


@corpus("shard")
def test_a_hostile_shard_is_refused(tmp_path, case):
    shutil.copy(case, tmp_path / "model.safetensors")
    with pytest.raises(InputError):
        read_shards(tmp_path)


@corpus("index")
def test_a_hostile_index_is_refused(tmp_path, case):
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    shutil.copy(case, tmp_path / "model.safetensors.index.json")
    with pytest.raises(InputError):
        read_shards(tmp_path)


@corpus("config")
def test_a_hostile_config_is_refused(llama, tmp_path, case):
    """A mapping changes the keys of an honest config, anything else takes its place."""
    folder = copied(llama, tmp_path / "model")
    (folder / "config.json").write_text(changed(folder, case.read_text()))
    with pytest.raises(InputError) as refused:
        open_as_compress_does(folder)
    assert len(str(refused.value)) < 2000


@corpus("manifest")
def test_a_hostile_manifest_is_refused(case):
    with pytest.raises(InputError):
        build(json.loads(case.read_text()))


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="holds no"):
        read_shards(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 7}', '{"model": {"type": "BPE"}}', "\0"])
def test_a_damaged_tokenizer_is_refused(llama, tmp_path, content):
    folder = copied(llama, tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(folder)


@FUZZ
@given(entry=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), junk), name=st.text(max_size=5),
       data=st.binary(max_size=40))  # fmt: skip
def test_any_header_is_read_or_refused(tmp_path, entry, name, data):
    whole = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **entry}
    text = json.dumps({name: whole}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    refused_or_fine(read_shards, tmp_path)


@FUZZ
@given(index=junk | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), junk, max_size=3)}))
def test_any_index_is_read_or_refused(tmp_path, index):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_or_fine(read_shards, tmp_path)


@FUZZ
@given(data=st.data(), architecture=st.sampled_from(["llama", "gpt2", "gemma3"]))
def test_any_config_is_read_or_refused(make_model, tmp_path, data, architecture):
    folder = tmp_path / architecture
    if not folder.exists():
        copied(make_model(architecture), folder)
    honest = json.loads((make_model(architecture) / "config.json").read_text())
    keys = data.draw(st.lists(st.sampled_from(sorted(honest)), min_size=1, max_size=2))
    (folder / "config.json").write_text(json.dumps({**honest, **{key: data.draw(junk) for key in keys}}))
    refused_or_fine(open_as_compress_does, folder)


@FUZZ
@given(data=st.data(), case=st.sampled_from(sorted((CORPUS / "manifest").iterdir())))
def test_any_manifest_is_read_or_refused(data, case):
    manifest = json.loads(case.read_text())
    modules = manifest.get("modules")
    if isinstance(modules, dict) and isinstance(entry := modules.get("w"), dict):
        entry |= data.draw(st.dictionaries(st.sampled_from(sorted(entry)), junk | st.integers(-2, 60), max_size=2))
    manifest |= data.draw(st.dictionaries(st.sampled_from(sorted(manifest)), junk, max_size=1))
    refused_or_fine(build, manifest)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"method": "lord"}, "order"),
        ({"method": "cospadi"}, "positions"),
        ({"method": {"name": "cospadi", "k_over_s": 16.0}}, "positions"),
        ({"method": {"name": "cospadi", "side": "input"}}, "inner.positions"),
        ({"method": "eora", "base": "wanda:2:4", "rank": 2, "ratio": None}, "base.positions"),
    ],
)
def test_an_index_that_points_nowhere_is_refused(llama, tmp_path, changes, tensor):
    output = tmp_path / "out"
    compress_tiny(llama, output, **changes)
    (shard,) = output.glob("*.safetensors")
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("." + tensor))
    tensors[name].view(torch.uint8).flatten()[0] ^= 0x7F
    save_file(tensors, shard, metadata={"format": "pt"})
    module = name.removesuffix("." + tensor)
    with pytest.raises(InputError, match=f"{module}.*damaged"):
        AutoModelForCausalLM.from_pretrained(output)
    with pytest.raises(InputError, match="damaged"):
        export_dense(str(output), tmp_path / "dense")


def refused_or_fine(read, subject):
    try:
        read(subject)
    except LrcompressError:
        pass


def copied(model, folder):
    shutil.copytree(model, folder)
    return folder


def changed(folder, text):
    try:
        change = json.loads(text)
    except (ValueError, RecursionError):
        return text
    honest = json.loads((folder / "config.json").read_text())
    return json.dumps({**honest, **change} if isinstance(change, dict) else change)


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_broken_config_is_named(llama, tmp_path, content):
    folder = copied(llama, tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json is (not valid JSON|no JSON object)"):
        inspect_model(str(folder))


@pytest.mark.parametrize("content", ['{"recipe": {"a": 1}, "ratio": 3}', '{"rows": []}', '{"recipe": {}, "ratio": {}}'])
def test_another_programs_report_beside_a_model_is_let_be(llama, tmp_path, content):
    folder = copied(llama, tmp_path / "model")
    (folder / "report.json").write_text(content)
    spec = EvaluateSpec(tasks=["tokens:python-docs@32"], limit=1)
    assert evaluate(str(folder), spec)["facts"].keys() == {"bytes"}


def test_a_broken_report_is_named(llama, tmp_path):
    folder = copied(llama, tmp_path / "model")
    (folder / "report.json").write_text("{")
    with pytest.raises(InputError, match=r"report\.json is not valid JSON"):
        evaluate(str(folder), EvaluateSpec(tasks=["tokens:python-docs@32"], limit=1))
    with pytest.raises(InputError, match=r"report\.json is not valid JSON"):
        compress(make_recipe({"model": str(llama), "method": "lord", "ratio": 0.2, "output": str(folder)}), resume=True)


@pytest.mark.parametrize(
    ("architecture", "key"), [("llama", "num_hidden_layers"), ("mixtral", "num_local_experts"), ("gpt2", "n_layer")]
)
def test_a_model_that_its_files_cannot_hold_is_never_built(make_model, tmp_path, monkeypatch, architecture, key):
    folder = copied(make_model(architecture), tmp_path / "model")
    (folder / "config.json").write_text(changed(folder, json.dumps({key: 3000})))
    monkeypatch.setattr("accelerate.init_empty_weights", None)  # what would build it
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    spec = EvaluateSpec(tasks=["tokens:python-docs@32"], limit=1)
    for read in (
        lambda: inspect_model(str(folder)),
        lambda: evaluate(str(folder), spec),
        lambda: compress(make_recipe({"model": str(folder), "method": "lord", "ratio": 0.2})),
    ):
        with pytest.raises(InputError, match="the config has .*num_.* 3000, which its checkpoint of .* cannot hold"):
            read()


def test_sizes_that_differ_between_layers_are_all_looked_at():
    from transformers import Gemma4TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    check_sizes(Gemma4TextConfig(vocab_size=320, head_dim=8, global_head_dim=16, **sizes), 60, 20_000)
    with pytest.raises(InputError, match="head_dim 20001, which its checkpoint of 20000 numbers cannot hold"):
        check_sizes(Gemma4TextConfig(vocab_size=320, head_dim=8, global_head_dim=20_001, **sizes), 60, 20_000)
