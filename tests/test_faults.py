"""Disks that fill up, memory that runs out, activations that overflow, processes that are killed: at any moment."""

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lrcompress.calibration.hidden import HiddenStates
from lrcompress.checkpoint.writer import ShardedWriter
from lrcompress.errors import InputError, Interrupted, ResourceError
from lrcompress.evaluation.compare import evaluate
from lrcompress.parallel.processes import Processes
from lrcompress.pipeline import compress, make_plan
from lrcompress.recipe import EvaluateSpec, make_recipe
from lrcompress.report import summary
from lrcompress.report.progress import Reporter
from lrcompress.run import run_recipe
from lrcompress.stages import decompose, needs, profile
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import Artefacts
from lrcompress.stages.request import check_request
from lrcompress.stages.workspace import MARKER, Workspace
from tests.commands import run_cli, start_cli
from tests.conftest import compress_tiny

METHODS = {
    "lord": {"method": "lord", "ratio": 0.3},
    "eora": {"method": "eora", "base": "rtn:3:16", "ratio": 0.6},
    "auto": {"method": "auto", "ratio": 0.3},
    "shared": {"method": {"name": "cospadi", "group": 2}, "ratio": 0.3},
}


def copied(model, folder):
    shutil.copytree(model, folder)
    return folder


def recipe(model, output, method):
    data = {"model": str(model), "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64}}
    return make_recipe({**data, "output": str(output), "shard_size": "40KB", **METHODS[method]})


@pytest.fixture
def whole(llama, once):
    """whole(method): what a run that nothing disturbs writes."""
    return lambda method: once(f"undisturbed {method}", lambda folder: compress(recipe(llama, folder, method)))


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


def failing(monkeypatch, owner, name, moment, error):
    """Let the `moment`-th call of owner.name raise."""
    original, calls = getattr(owner, name), iter(range(10**9))

    def call(*args, **kwargs):
        if next(calls) == moment:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def real_lack_of_memory():
    try:
        torch.empty(2**47, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("that much memory was there")


PHASES = [
    (HiddenStates, "write", 0),
    (HiddenStates, "write", 9),
    (profile, "write_tensors", 0),
    (profile, "write_tensors", 2),
    (ShardedWriter, "_seek", 0),
    (ShardedWriter, "_seek", 20),
]


@pytest.mark.parametrize(("owner", "name", "moment"), PHASES)
@pytest.mark.parametrize("method", ["lord", "eora", "auto"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fills_up_at_any_phase_is_resumed_from(
    llama, whole, tmp_path, monkeypatch, owner, name, moment, method, code
):
    if code == errno.EIO and method != "lord":
        pytest.skip("once is enough")
    made = recipe(llama, tmp_path / "out", method)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    error = OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:
        wrapped = owner is profile
        failing(patch, owner, name, moment, ResourceError("full") if wrapped else error)
        with pytest.raises(ResourceError):
            compress(made, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    compress(made, overwrite=True, resume=True)
    assert files(tmp_path / "out") == files(whole(method))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("owner", "name"), [(decompose, "decompose_site"), (HiddenStates, "read"), (ShardedWriter, "write")]
)
def test_memory_that_runs_out_is_a_resource_error_and_resumed_from(llama, tmp_path, monkeypatch, owner, name):
    made = recipe(llama, tmp_path / "out", "lord")
    with monkeypatch.context() as patch:
        failing(patch, owner, name, 1, real_lack_of_memory())
        with pytest.raises(ResourceError, match=r"out of memory on .*--resume"):
            compress(made)
    assert not (tmp_path / "out").exists()
    compress(made, resume=True)


def test_an_error_that_is_nobodys_fault_of_input_is_not_disguised(llama, tmp_path, monkeypatch):
    failing(monkeypatch, decompose, "decompose_site", 1, RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        compress(recipe(llama, tmp_path / "out", "lord"))


@pytest.mark.parametrize(("method", "solver"), [("lord", "eigh"), ("auto", "solve_triangular")])
def test_a_decomposition_that_does_not_converge_is_named_and_leaves_nothing(
    llama, tmp_path, monkeypatch, method, solver
):
    failed = torch.linalg.LinAlgError(f"linalg.{solver}: The algorithm failed to converge")
    failing(monkeypatch, torch.linalg, solver, 5, failed)
    with pytest.raises(InputError, match=rf"_proj: linalg\.{solver}"):
        compress(recipe(llama, tmp_path / "out", method))
    assert list(tmp_path.iterdir()) == []


def test_an_overflowing_sum_of_inputs_names_the_weight(llama, tmp_path):
    """Activations that are finite, with squares that are not."""
    folder = copied(llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e20
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e-25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj: the Gram of its inputs"):
        compress_tiny(folder, tmp_path / "out", method="cospadi")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overflowing_activations_name_the_block(llama, tmp_path):
    folder = copied(llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e25
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for method in ("lord", "auto"):
        with pytest.raises(InputError, match=r"layers\.1.*non-finite"):
            compress_tiny(folder, tmp_path / "out", method=method)


def test_a_shard_that_goes_bad_while_it_is_read(make_model, tmp_path, monkeypatch):
    folder = copied(make_model("llama", shards=True), tmp_path / "model")
    save = Artefacts.save

    def damage(self, block, artefacts):
        save(self, block, artefacts)
        for path in folder.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:100])

    monkeypatch.setattr(Artefacts, "save", damage)
    with pytest.raises(InputError, match=r"model-0000.*truncated or damaged"):
        compress_tiny(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_that_cannot_be_made_is_refused(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        compress_tiny(llama, tmp_path / "file/out")


def test_needs_are_told_before_and_refused_early(llama, tmp_path, monkeypatch):
    made = recipe(llama, tmp_path / "out", "lord")
    told = make_plan(made)["needs"]
    assert told["memory_bytes"] > 10**8
    assert told["disk_bytes"] > sum(len(data) for data in files(llama).values())
    assert told["seconds"] > 0
    with pytest.raises(ResourceError, match=r"needs about \d+ MB of memory, --memory allows 50MB"):
        compress(made.model_copy(update={"memory": "50MB"}))
    with pytest.raises(ResourceError, match=r"needs about \d+ MB of memory, --memory allows 50MB"):
        make_plan(made.model_copy(update={"memory": "50MB"}))
    report = compress(made.model_copy(update={"memory": "90GB"}), overwrite=True).report
    assert report["needs"].keys() == told.keys()
    monkeypatch.setattr("lrcompress.stages.workspace.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(ResourceError, match=r"needs about \d+ MB of disk, 1 MB are free"):
        compress(recipe(llama, tmp_path / "other", "lord"))
    assert not list((tmp_path / "other.partial").glob("scratch/hidden"))


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("step", range(5))
def test_ended_while_publishing(llama, whole, tmp_path, monkeypatch, step):
    """Before whichever of the last steps it ends, a resumed run gives the whole output and leaves nothing beside it."""
    made = recipe(llama, tmp_path / "out", "lord")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("older")
    publish = Workspace.publish

    def ended(self):
        (self.scratch / "identity.json").unlink()  # scratch files go one by one
        left = iter(range(step))

        def counted(original):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return original(*args, **kwargs)

            return call

        patch.setattr("lrcompress.stages.workspace.shutil.rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "rename", counted(Path.rename))
        publish(self)

    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced/mine").write_text("not yours")
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", ended)
        if step < 4:
            with pytest.raises(Killed):
                compress(made, overwrite=True)
        else:
            compress(made, overwrite=True)
    compress(made, overwrite=True, resume=True)
    assert files(tmp_path / "out") == files(whole("lord"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]
    assert (tmp_path / "out.replaced/mine").read_text() == "not yours"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in whole("lord").iterdir()}


def disturbed(command, output, seed, most):
    """Kill the command after random delays, again and again with --resume, until it ends by itself."""
    delays = random.Random(seed)
    for kills in range(most + 1):
        resume = ["--resume"] if kills else []
        process = start_cli(*command, *resume)
        partial = output.with_name(output.name + ".partial")
        while kills < most and process.running and not (partial / MARKER).exists():
            time.sleep(0.005)  # opening a model takes longest and changes nothing
        if kills < most:
            time.sleep(delays.uniform(0, 1.5))
            process.send(signal.SIGKILL)
        done = process.wait()
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0, done.stderr
            return kills
    raise AssertionError("the last run was not to be killed")


def kill_and_compare(model, folder, method, seed, most):
    command = ["compress", model, "--samples", 24, "--seqlen", 64, "--shard-size", "40KB", *method]
    whole = folder / "whole"
    if not whole.exists():
        assert run_cli(*command, "-o", whole).returncode == 0
    output = folder / f"killed-{seed}"
    kills = disturbed([*command, "-o", output], output, seed, most)
    assert files(output) == files(whole)
    for name in ("config.json", "plan.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert not output.with_name(output.name + ".partial").exists()
    return kills


RUNS = {
    "lord": ["--method", "lord", "--ratio", "0.3"],
    "eora": ["--method", "eora", "--base", "rtn:3:16", "--ratio", "0.6"],
    "auto": ["--method", "auto", "--ratio", "0.3"],
    "shared": ["--method", "cospadi", "--set", "group=2", "--ratio", "0.3"],
}


@pytest.mark.parametrize("run", [pytest.param("lord", marks=pytest.mark.slow), "auto"])
def test_killed_at_random_and_resumed_gives_the_same_files(llama, tmp_path, run):
    kill_and_compare(llama, tmp_path, RUNS[run], seed=1, most=2)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_killed_many_times_at_random_and_resumed_gives_the_same_files(llama, tmp_path, run):
    kills = sum(kill_and_compare(llama, tmp_path, RUNS[run], seed, most=6) for seed in range(20))
    assert kills >= 20


def of_own_files(llama, tmp_path):
    """A text and a model that a test may change, and the recipe that names them."""
    text, model = tmp_path / "text.txt", copied(llama, tmp_path / "model")
    text.write_text("".join(f"the {i}th sentence of this text is as good as any other, " for i in range(3000)))
    data = {"model": str(model), "method": "lord", "ratio": 0.3, "output": str(tmp_path / "out"),
            "calibration": {"source": str(text), "samples": 4, "seqlen": 64}}  # fmt: skip
    return text, model, data


def change_a_weight(model):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_resuming_with_another_recipe_model_or_text_is_refused(llama, tmp_path, monkeypatch):
    text, model, data = of_own_files(llama, tmp_path)
    with monkeypatch.context() as patch:
        failing(patch, Artefacts, "save", 1, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            compress(make_recipe(data))
    before = {path: path.read_bytes() for path in (tmp_path / "out.partial").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="recipe changed since"):
        compress(make_recipe({**data, "ratio": 0.4}), resume=True)
    whole = text.read_text()
    text.write_text("another " + whole)
    with pytest.raises(InputError, match="calibration text changed since"):
        compress(make_recipe(data), resume=True)
    text.write_text(whole)
    change_a_weight(model)
    with pytest.raises(InputError, match="model files changed since"):
        compress(make_recipe(data), resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_resuming_with_other_processes_or_versions_is_refused(llama, tmp_path, monkeypatch):
    made = recipe(llama, tmp_path / "out", "lord")
    with monkeypatch.context() as patch:
        failing(patch, Artefacts, "save", 1, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            compress(made)
    with monkeypatch.context() as patch:
        patch.setattr("lrcompress.stages.identity.processes", lambda: Processes(0, 2))
        with pytest.raises(InputError, match="number of processes changed since"):
            compress(made, resume=True)
    version = summary.version
    with monkeypatch.context() as patch:
        patch.setattr(summary, "version", lambda name: "0" if name == "transformers" else version(name))
        with pytest.raises(InputError, match="versions changed since"):
            compress(made, resume=True)
    compress(made, resume=True)


def test_a_finished_run_knows_what_it_was_made_from(llama, tmp_path):
    text, model, data = of_own_files(llama, tmp_path)
    compress(make_recipe(data))
    kept = files(tmp_path / "out")
    with pytest.raises(InputError, match=r"another recipe \(ratio differ\)"):
        compress(make_recipe({**data, "ratio": 0.4}), resume=True)
    whole = text.read_text()
    text.write_text("another " + whole)
    with pytest.raises(InputError, match="finished run, and calibration files changed since"):
        compress(make_recipe(data), resume=True)
    text.write_text(whole)
    compress(make_recipe(data), resume=True)
    change_a_weight(model)
    with pytest.raises(InputError, match="finished run, and model files changed since"):
        compress(make_recipe(data), resume=True)
    assert files(tmp_path / "out") == kept


def test_a_finished_run_is_known_by_another_path_and_judged_anew(llama, tmp_path, monkeypatch):
    data = {"model": str(llama), "method": "lord", "ratio": 0.3, "output": str(tmp_path / "out"),
            "calibration": {"samples": 4, "seqlen": 64}, "expect": ["token_perplexity <= 1"],
            "evaluate": {"tasks": ["tokens:python-docs@64"], "limit": 2}}  # fmt: skip
    first = run_recipe(make_recipe(data)).report
    assert not first["evaluation"]["expectations"][0]["met"]
    monkeypatch.chdir(tmp_path)
    other = {**data, "output": "./out", "memory": "90GB", "expect": ["token_perplexity <= 1e9"]}
    again = run_recipe(make_recipe(other), resume=True).report
    assert again["evaluation"]["expectations"][0]["met"]
    assert again["evaluation"]["results"] == first["evaluation"]["results"]
    assert again["seconds"] == first["seconds"]
    assert summary.load_report(tmp_path / "out")["recipe"]["expect"] == other["expect"]


@pytest.mark.parametrize("holds", ["model", "text", "base", "task", "itself"])
def test_an_output_that_holds_what_is_read_is_refused(llama, tmp_path, holds):
    where = tmp_path / "project"
    model = copied(llama, where / "model" if holds in ("model", "itself") else tmp_path / "model")
    text = where / "text.txt" if holds == "text" else tmp_path / "text.txt"
    task = where / "task.txt" if holds == "task" else tmp_path / "task.txt"
    where.mkdir(exist_ok=True)
    text.write_text("one sentence of a text\n" * 1000)
    task.write_text("one sentence of a text\n" * 1000)
    base = compress_tiny(llama, (where if holds == "base" else tmp_path) / "base", method="eora", base="rtn:4:16",
                         ratio=None, rank=0).folder  # fmt: skip
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data = {"model": str(model), "method": "eora", "base": str(base), "rank": 1,
            "output": str(model if holds == "itself" else where),
            "calibration": {"source": str(text), "samples": 2, "seqlen": 32},
            "evaluate": {"tasks": [f"tokens:{task}@32"]}}  # fmt: skip
    with pytest.raises(InputError, match="holds .*, which is read: choose another -o"):
        run_recipe(make_recipe(data), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_needs_count_what_is_loaded_whole_and_what_only_some_runs_write(llama, tmp_path, monkeypatch):
    def opened(**changes):
        data = {"model": str(llama), "method": "lord", "ratio": 0.3, **changes}
        data.setdefault("calibration", {"source": "python-docs", "samples": 4, "seqlen": 64})
        return open_request(check_request(make_recipe(data)), Reporter(quiet=True), calibrate=False)

    tensors = load_file(llama / "model.safetensors")
    numbers, head = sum(tensor.numel() for tensor in tensors.values()), tensors["model.embed_tokens.weight"].numel()
    monkeypatch.setattr(needs, "peak_rss_bytes", lambda: 0)
    monkeypatch.setattr(needs.psutil.Process, "memory_info", lambda _: type("Memory", (), {"rss": 0}))
    for part in ("_block_weights", "_statistics", "_decomposition"):  # whatever a block needs, the model is more
        monkeypatch.setattr(needs, part, lambda opened, block: 0)
    monkeypatch.setattr(needs, "_activations", lambda opened: 0)
    monkeypatch.setattr(needs, "longest", lambda opened: 0)
    outside = sum(tensor.numel() for name, tensor in tensors.items() if ".layers." not in name)  # read when first used
    # A tensor's pages, a copy, and another to write.
    assert needs.memory_need(opened()) == 4 * outside + 3 * 4 * head
    calibration = {"source": "self", "samples": 4, "seqlen": 64}
    for changes in ({"calibration": calibration}, {"ratio": None, "max_loss": "2%"}, {"refine": 1}):
        assert needs.memory_need(opened(**changes)) >= 4 * numbers
    monkeypatch.undo()
    plain, sensitive = opened(), opened(allocator="sensitivity")
    layers = [site for site in sensitive.sites if site.block < 3]
    states = 2 * (1 + len(layers)) * 64 * 32 * 4
    assert needs.disk_need(sensitive) - needs.disk_need(plain) == states
    alone = needs.disk_need(plain)
    assert needs.disk_need(plain, 2) - alone == plain.dense_checkpoint_bytes


def exploding(*arguments, **options):
    raise real_lack_of_memory()


@pytest.mark.parametrize("task", ["tokens:python-docs@64", "text:python-docs"])
def test_lack_of_memory_while_evaluating(llama, tmp_path, monkeypatch, task):
    spec = EvaluateSpec(tasks=[task], limit=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "silu", exploding)
        patch.setattr(torch.nn.SiLU, "forward", exploding)
        with pytest.raises(ResourceError, match="out of memory while"):
            evaluate(str(llama), spec)


def test_lack_of_memory_in_a_plan(llama, monkeypatch):
    asked = {"model": str(llama), "method": "auto", "ratio": 0.3, "calibration": {"samples": 2, "seqlen": 64}}
    monkeypatch.setattr(HiddenStates, "write", exploding)
    with pytest.raises(ResourceError, match="out of memory"):
        make_plan(make_recipe(asked))
