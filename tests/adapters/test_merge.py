"""A shared basis against principal components of the dense updates, and extraction through PEFT."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lrcompress.adapters.extract import extract
from lrcompress.adapters.merge import Room, merge
from lrcompress.errors import InputError
from lrcompress.linalg.common_basis import common_basis, gram
from tests.adapters.conftest import deltas, embedding_delta, logits
from tests.commands import run_cli
from tests.conftest import compress_tiny


def factors(seed, count=4, shape=(20, 5, 14)):
    generator = torch.Generator().manual_seed(seed)
    m, r, n = shape
    return (
        [torch.randn(m, r, dtype=torch.float64, generator=generator) for _ in range(count)],
        [torch.randn(r, n, dtype=torch.float64, generator=generator) for _ in range(count)],
    )


def test_the_basis_is_the_principal_components_of_the_flattened_matrices():
    lefts, rights = factors(0)
    flat = torch.stack([(a @ b).flatten() for a, b in zip(lefts, rights, strict=True)])
    _, s, vt = torch.linalg.svd(flat, full_matrices=False)
    coefficients, elements = common_basis(lefts, rights)
    torch.testing.assert_close(gram(lefts, rights), flat @ flat.T)
    torch.testing.assert_close(coefficients.T @ coefficients, torch.eye(4, dtype=torch.float64))
    for j, element in enumerate(elements):
        assert float(element.energies.sum()) == pytest.approx(float(s[j] ** 2))
        whole = (element.left @ element.right).flatten()
        assert abs(float(whole @ vt[j])) == pytest.approx(float(s[j]), rel=1e-9)


def test_errors_of_truncated_elements_add_up():
    lefts, rights = factors(1)
    coefficients, elements = common_basis(lefts, rights)
    ranks = [4, 7, 0, 2]
    cut = torch.stack([e.left[:, :r] @ e.right[:r] for e, r in zip(elements, ranks, strict=True)])
    lost = 0.0
    for i, (a, b) in enumerate(zip(lefts, rights, strict=True)):
        lost += float((a @ b - torch.einsum("j,jmn->mn", coefficients[i], cut)).square().sum())
    assert lost == pytest.approx(sum(float(e.energies[r:].sum()) for e, r in zip(elements, ranks, strict=True)))


@pytest.fixture
def related(make_adapter):
    """Three adapters that are combinations of two, up to a little: of the same matrices A, as one seed gives them."""

    def make(noise=0.02, **config):
        folders = [make_adapter(seed, **config) for seed in range(3)]
        tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        from safetensors.torch import save_file

        for name in tensors[0]:
            if "lora_A" in name:
                tensors[1][name] = tensors[2][name] = tensors[0][name]
            elif "lora_B" in name:
                mixed = 3 * tensors[0][name] - tensors[1][name]
                tensors[2][name] = mixed + noise * tensors[2][name]
        for folder, part in zip(folders, tensors, strict=True):
            save_file({name: t.contiguous().clone() for name, t in part.items()}, folder / "adapter_model.safetensors")
        return folders

    return make


def relative(before, after):
    lost = sum(float((before[n] - after.get(n, 0)).square().sum()) for n in before)
    return (lost / sum(float(update.square().sum()) for update in before.values())) ** 0.5


def test_two_elements_hold_three_related_tasks(related, load_adapter, tmp_path):
    folders = related(use_rslora=True)
    report = merge([str(f) for f in folders], tmp_path / "shared", Room(basis=2))
    assert 0.3 < report["ratio"] < 1 / 3
    assert report["bytes"]["shared"] == sum(
        t.nbytes for t in load_file(tmp_path / "shared/shared.safetensors").values()
    )
    for folder, task in zip(folders, report["tasks"], strict=True):
        result = extract(str(tmp_path / "shared"), folder.name, tmp_path / f"out-{folder.name}")
        before, after = deltas(load_adapter(folder)), deltas(load_adapter(tmp_path / f"out-{folder.name}"))
        assert before.keys() == after.keys()
        assert relative(before, after) == pytest.approx(task["relative_error"], rel=1e-3)
        assert result["relative_error"] == pytest.approx(task["relative_error"], rel=1e-6)
        assert task["relative_error"] < 0.02
        assert result["ranks"] == [8, 8]  # one A for all tasks: no larger than before
    assert merge([str(f) for f in folders], tmp_path / "one", Room(basis=1), dry_run=True)["relative_error"] > 0.1
    assert not (tmp_path / "one").exists()


def test_an_error_is_kept_and_a_size_too(related, load_adapter, tmp_path):
    folders = [str(folder) for folder in related(noise=0.5)]
    errors = []
    coarse = merge(folders, tmp_path / "coarse", Room(error=0.9))
    assert min(module["elements"] for module in coarse["modules"]) == 0
    extract(str(tmp_path / "coarse"), "adapter-1", tmp_path / "out")
    found, before = deltas(load_adapter(tmp_path / "out")), deltas(load_adapter(folders[1]))
    assert relative(before, found) == pytest.approx(coarse["tasks"][1]["relative_error"], rel=1e-3)
    for limit in (0.4, 0.2, 0.1):
        report = merge(folders, tmp_path / f"error-{limit}", Room(error=limit))
        assert report["relative_error"] <= limit * 1.0001
        errors.append(report["bytes"]["shared"])
    assert errors == sorted(errors)
    sized = merge(folders, tmp_path / "size", Room(size=str(errors[1])))
    assert sized["bytes"]["shared"] <= errors[1]
    assert sized["relative_error"] < 0.4


def test_tasks_with_other_modules_and_tensors(make_adapter, load_adapter, tmp_path):
    first = make_adapter(0, target_modules=["q_proj", "v_proj"], lora_bias=True, use_rslora=True)
    second = make_adapter(1, target_modules=["q_proj", "embed_tokens"], r=4, dtype=torch.bfloat16)
    report = merge([str(first), str(second)], tmp_path / "shared", Room(error=0.3))
    assert {module["tasks"] for module in report["modules"]} == {1, 2}
    for folder in (first, second):
        extract(str(tmp_path / "shared"), folder.name, tmp_path / f"out-{folder.name}")
        before, after = load_adapter(folder), load_adapter(tmp_path / f"out-{folder.name}")
        assert relative(deltas(before), deltas(after)) < 0.45
        assert (embedding_delta(before) is None) == (folder == first)
        if folder == second:
            torch.testing.assert_close(embedding_delta(after), embedding_delta(before), rtol=0.02, atol=0.01)
        assert logits(after).isfinite().all()


def test_what_is_refused(make_adapter, llama, tmp_path):
    first, second = str(make_adapter(0)), str(make_adapter(1))
    other = str(make_adapter(2, architecture="gpt2", target_modules=["c_attn"], fan_in_fan_out=True))
    for labels, room, message in (
        ([first], Room(basis=1), "two adapters or more"),
        ([first, first], Room(basis=1), "two adapters are called"),
        ([first, second], Room(basis=2), "1 to 1 elements"),
        ([first, second], Room(), "give one of"),
        ([first, second], Room(basis=1, error=0.1), "give one of"),
        ([first, second], Room(error=2.0), "outside"),
        ([first, second], Room(size="0.01KB"), "ask for more"),
        ([first, second], Room(error=0.001), "too little in common"),
        ([first, other], Room(basis=1), "too little in common"),
        ([first, str(llama)], Room(basis=1), "adapter_config.json"),
    ):
        with pytest.raises(InputError, match=message):
            merge(labels, tmp_path / "out", room)
    with pytest.raises(InputError, match="which is read"):
        merge([first, second], make_adapter(0), Room(basis=1), overwrite=True)
    merge([first, second], tmp_path / "shared", Room(basis=1))
    with pytest.raises(InputError, match="did you mean 'adapter-0'"):
        extract(str(tmp_path / "shared"), "adapter0", tmp_path / "out")
    with pytest.raises(InputError, match=r"no shared\.json"):
        extract(first, "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["low_rank", "pivoted"])
def test_models_of_one_base(llama, tmp_path, format):
    """Three compressed models whose factors were trained apart, a little: two are told by one element's own part."""
    from transformers import AutoModelForCausalLM

    from lrcompress.model.surgery import dense_parts, stored_layers

    method = {"name": "lord", "metric": "centred"}
    compress_tiny(llama, tmp_path / "task-0", method=method, format=format, ratio=0.5)
    for i in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "task-0")
        generator = torch.Generator().manual_seed(i)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                parameter.data += 0.01 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        model.model.norm.weight.data *= 1 + 0.1 * i
        model.save_pretrained(tmp_path / f"task-{i}")
    folders = [tmp_path / f"task-{i}" for i in range(3)]
    report = merge([str(folder) for folder in folders], tmp_path / "shared", Room(basis=1))
    assert report["ratio"] > 0.6
    stored = load_file(tmp_path / "shared/shared.safetensors")
    assert sum(t.nbytes for t in stored.values()) == report["bytes"]["shared"] + report["bytes"]["carried"]
    assert {name for name in stored if "embed" in name} == {"task-0|model.embed_tokens.weight"}
    for folder, task in zip(folders, report["tasks"], strict=True):
        out = tmp_path / f"out-{folder.name}"
        extract(str(tmp_path / "shared"), folder.name, out)
        before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, out))
        layers = stored_layers(before), stored_layers(after)
        assert {n: layer.spec for n, layer in layers[0].items()} == {n: layer.spec for n, layer in layers[1].items()}
        weights = [{n: dense_parts(layer)[0].double() for n, layer in found.items()} for found in layers]
        assert relative(*weights) == pytest.approx(task["relative_error"], rel=1e-2)
        assert task["relative_error"] < 0.05
        assert torch.equal(before.model.norm.weight, after.model.norm.weight)
        for name, layer in layers[0].items():
            torch.testing.assert_close(layers[1][name].dense_bias(), layer.dense_bias(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logits(after), logits(before), rtol=0.2, atol=0.4)
    with pytest.raises(InputError, match="dense|adapter_config"):
        merge([str(folders[0]), str(llama)], tmp_path / "other", Room(basis=1))


def test_command_line(related, tmp_path):
    folders = related()
    result = run_cli("merge", *folders, "-o", tmp_path / "shared", "--basis", 2, "--json", tmp_path / "merge.json")
    assert result.returncode == 0, result.stderr
    assert "saved 3" in result.stdout
    assert json.loads((tmp_path / "merge.json").read_text()) == json.loads(
        (tmp_path / "shared/report.json").read_text()
    )
    result = run_cli("extract", tmp_path / "shared", "--task", folders[2].name, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_tied_embeddings_come_back_as_one_update(make_adapter, load_adapter, tmp_path):
    """With as many components as there are, every task is what it was, embeddings and head alike."""
    config = {
        "target_modules": ["embed_tokens", "v_proj"],
        "ensure_weight_tying": True,
        "alpha_pattern": {"lm_head": 3},
    }
    folders = [make_adapter(seed, "qwen3", r=3, decay=1.0, **config) for seed in range(2)]
    folders.append(Path(shutil.copytree(folders[0], tmp_path / "again")))
    merge([str(f) for f in folders], tmp_path / "shared", Room(error=1e-5))
    for folder in folders:
        out = tmp_path / "out" / folder.name
        with pytest.raises(InputError, match=r"two numbers.*--per-module-ranks"):
            extract(str(tmp_path / "shared"), folder.name, out)
        extract(str(tmp_path / "shared"), folder.name, out, per_module_ranks=True)
        before, after = (load_adapter(one, "qwen3") for one in (folder, out))
        torch.testing.assert_close(embedding_delta(after), embedding_delta(before), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(after), logits(before), rtol=1e-3, atol=1e-3)
        names = [set(load_file(one / "adapter_model.safetensors")) for one in (folder, out)]
        assert names[0] == names[1]
