"""Several processes, as torchrun starts them: the same checkpoint as one process makes, up to rounding; no hang."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from lrcompress.errors import InputError
from lrcompress.evaluation.compare import evaluate
from lrcompress.export.source import open_compressed
from lrcompress.parallel.processes import Processes
from lrcompress.pipeline import make_plan
from lrcompress.recipe import EvaluateSpec
from lrcompress.stages.needs import Needs
from tests.commands import run_cli, start_cli, start_code
from tests.conftest import compress_tiny
from tests.test_benchmarks import BENCHMARKS
from tests.test_pipeline import recipe


def start(*arguments, launcher=("--standalone", "--nproc-per-node", "2")):
    """By torchrun."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "lrcompress", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def free_address():
    """HOST:PORT where processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def together(count, begin):
    """The processes that begin(environment) starts, in the environment that torchrun gives `count` of them; all done."""
    address, _, port = free_address().partition(":")
    common = {"MASTER_ADDR": address, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    started = [begin({**common, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    return [process.wait() for process in started]


def run_two(*arguments):
    """Two processes, which need not import torch; what both said."""
    done = together(2, lambda environment: start_cli(*arguments, environment=environment))
    code = next((one.returncode for one in done if one.returncode), 0)
    return code, "".join(one.stdout for one in done), "".join(one.stderr for one in done)


def compress_arguments(model, output, *more):
    return ["compress", model, "--samples", 5, "--seqlen", 64, "-o", output, *more]


def finished(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def dense_weights(folder):
    source = open_compressed(str(folder))
    return {name: source.layer(name).dense() for name in source.manifest.modules}


def same_checkpoint(one, other):
    """What every layer computes; the factors themselves may turn where singular values are close."""
    ours, theirs = dense_weights(one), dense_weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        error = float((weight - theirs[name]).norm() / weight.norm())
        assert error < 1e-3, (name, error)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("auto", ["--ratio", 0.3, "--target", "*_proj", "--target", "lm_head", "--shard-size", "20KB"]),
        ("ecsq", ["--bpw", 4, "--set", "metric=input"]),
        pytest.param("eora", ["--rank", 2, "--base", "rtn:3:16", "--set", "toward_dense=0.5"], marks=pytest.mark.slow),
        pytest.param("cospadi", ["--ratio", 0.3, "--set", "group=2"], marks=pytest.mark.slow),
        pytest.param("lord", ["--ratio", 0.3, "--allocator", "sensitivity"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_what_one_does(llama, tmp_path, method, more):
    code, out, err = run_two(*compress_arguments(llama, tmp_path / "two", "--method", method, *more))
    assert code == 0, err
    assert out.count("wrote ") == 1
    alone = run_cli(*compress_arguments(llama, tmp_path / "one", "--method", method, *more))
    assert alone.returncode == 0, alone.stderr
    same_checkpoint(tmp_path / "one", tmp_path / "two")
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert names[0] == names[1]
    report = json.loads((tmp_path / "two/report.json").read_text())
    told, foretold = report["processes"]["traffic_bytes"], report["needs"]["traffic_bytes"]
    assert told == foretold if method != "eora" else foretold < told < 1.5 * foretold
    if method == "auto":
        shards = sorted((tmp_path / "two").glob("model-*.safetensors"))
        assert len(shards) > 3
        tensors = [
            {k: (v.shape, v.dtype) for k, v in load_file(tmp_path / f / shards[1].name).items()} for f in ("one", "two")
        ]
        assert tensors[0] == tensors[1]
        index = [(tmp_path / folder / "model.safetensors.index.json").read_text() for folder in ("one", "two")]
        assert index[0] == index[1]


WORK = """
import json, sys
from contextlib import contextmanager

sys.path.append(sys.argv[1])
from scale import operations
from lrcompress.pipeline import compress
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter


class Work(Reporter):
    @contextmanager
    def timed(self, key):
        with operations() as counter:
            yield
        self.seconds[key] = self.seconds.get(key, 0) + counter.get_total_flops()


reporter = Work(quiet=True)
compress(make_recipe(json.loads(sys.argv[2])), reporter=reporter)
print(json.dumps(reporter.seconds))
"""


@pytest.mark.parametrize(
    ("architecture", "method", "limits"),
    [
        ("qwen3_moe", "lord", {2: 0.6}),
        pytest.param("llama", "lord", {2: 0.6, 4: 0.4}, marks=pytest.mark.slow),
        pytest.param("llama", "ecsq", {2: 0.6, 4: 0.4}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_share_the_work(make_model, tmp_path, architecture, method, limits):
    """Counted in operations, as all would run on the same two cores here; experts are weights among the others."""

    def work(count):
        text = {"source": "python-docs", "samples": 16, "seqlen": 64}
        recipe = {"model": str(make_model(architecture)), "method": method, "calibration": text, "ratio": 0.6}
        recipe = json.dumps({**recipe, "output": str(tmp_path / str(count))})
        done = together(count, lambda env: start_code(WORK, BENCHMARKS, recipe, environment=env))
        assert not any(one.returncode for one in done), "".join(one.stderr for one in done)
        return [json.loads(one.stdout.splitlines()[-1]) for one in done]

    (alone,) = work(1)
    assert set(alone) >= {"calibrate", "decompose", "write"}
    for count, limit in limits.items():
        found = work(count)
        same_checkpoint(tmp_path / "1", tmp_path / str(count))
        for phase in ("calibrate", "decompose"):
            most = max(one[phase] for one in found)
            assert most <= limit * alone[phase], (count, phase, most / alone[phase])
        assert max(sum(one.values()) for one in found) <= (limit + 0.1) * sum(alone.values())


def test_two_processes_search_refine_and_evaluate(llama, tmp_path):
    """A recipe with everything: the ratio that a loss allows, a training after it, a metric and an expectation."""
    recipe = {
        "model": str(llama), "method": "lord", "max_loss": 0.3, "refine": 0.05, "output": str(tmp_path / "out"),
        "calibration": {"source": "python-docs", "samples": 5, "seqlen": 64},
        "evaluate": {"tasks": ["tokens:python-docs@64"], "limit": 2},
        "expect": ["token_perplexity > 1"],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, out, err = run_two("run", tmp_path / "recipe.yaml", "--json", tmp_path / "result.json")
    assert code == 0, err
    assert out.count("wrote ") == 1
    report = json.loads((tmp_path / "result.json").read_text())
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["search"]["loss"] <= 0.3
    assert report["ratio"]["stored"] == pytest.approx(report["search"]["ratio"], abs=0.01)
    assert report["refined"]["processes"] == 2
    assert report["refined"]["steps"] > 0
    spec = EvaluateSpec(tasks=["tokens:python-docs@64"], limit=2)
    again = evaluate(str(tmp_path / "out"), spec)["results"]["tokens:python-docs@64"]["token_perplexity"]
    assert report["evaluation"]["expectations"][0]["value"] == pytest.approx(again, rel=1e-6)


def test_a_process_that_dies_ends_the_run_and_what_it_did_is_continued(llama, tmp_path):
    arguments = compress_arguments(llama, tmp_path / "out", "--method", "lord", "--ratio", 0.3)
    process = start(*arguments)
    deadline = time.monotonic() + 120
    child = None
    while child is None and time.monotonic() < deadline:
        if (tmp_path / "out.partial/scratch").exists():
            child = _second(process.pid)
        time.sleep(0.02)
    assert child is not None
    os.kill(child, signal.SIGKILL)
    code, _, err = finished(process, timeout=90)
    assert code != 0
    assert "Signal 9" in err or "SIGKILL" in err
    assert not (tmp_path / "out").exists()
    code, out, err = finished(start(*arguments, "--resume"))
    assert code == 0, err
    assert out.count("wrote ") == 1
    whole = compress_tiny(
        llama, tmp_path / "one", ratio=0.3, calibration={"source": "python-docs", "samples": 5, "seqlen": 64}
    )
    same_checkpoint(tmp_path / "out", whole.folder)


def _second(parent):
    """The process of rank 1 among the children of torchrun."""
    import psutil

    for child in psutil.Process(parent).children():
        if child.environ().get("RANK") == "1":
            return child.pid
    return None


def test_a_machine_that_dies_ends_the_run_and_what_it_did_is_continued(llama, tmp_path):
    """Two agents of torchrun that share nothing but the folder; one and all that it started are gone at once."""
    import psutil

    arguments = compress_arguments(llama, tmp_path / "out", "--method", "lord", "--ratio", 0.3)
    address, _, port = free_address().partition(":")
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", address, "--master-port", port, "--node-rank"]
    machines = [start(*arguments, launcher=[*where, str(rank)]) for rank in range(2)]
    deadline, begun = time.monotonic() + 120, tmp_path / "out.partial/scratch/artefacts"
    while not (begun.exists() and any(begun.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.005)
    agent = psutil.Process(machines[1].pid)
    for process in [*agent.children(recursive=True), agent]:
        process.kill()
    code, _, err = finished(machines[0], timeout=90)
    finished(machines[1])
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("[process ")]
    assert len(said) == 1, err
    assert "another process of this run has ended" in said[0]
    assert "--resume" in said[0]
    assert not (tmp_path / "out").exists()
    code, out, err = run_two(*arguments, "--resume")
    assert code == 0, err
    assert out.count("wrote ") == 1
    code, _, err = run_two(*compress_arguments(llama, tmp_path / "whole", "--method", "lord", "--ratio", 0.3))
    assert code == 0, err
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_jobs_are_shared_by_cost():
    costs = [5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0]
    shares = [Processes(rank, 3).own(costs) for rank in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(7))
    assert max(sum(costs[place] for place in share) for share in shares) == 5.0
    assert [list(Processes(rank, 2).samples(5)) for rank in range(2)] == [[0, 2, 4], [1, 3]]
    assert Processes().own(costs) == list(range(7))


def test_what_one_process_does_is_refused_to_several(monkeypatch, llama):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        make_plan(recipe(llama))


@pytest.mark.parametrize("method", ["lord", "ecsq", "eora"])
def test_a_plan_for_several_machines(llama, method):
    """The closed form: of every input's group counts, sum and moment; of every gradient its moment and a count."""
    text = {"source": "python-docs", "samples": 8, "seqlen": 64}
    asked = recipe(
        llama,
        calibration=text,
        **{"method": method, **({"ratio": 0.3} if method != "eora" else {"ratio": None, "rank": 2})},
    )
    alone, many = (make_plan(asked, nodes=nodes, devices=devices) for nodes, devices in ((1, 1), (2, 4)))
    assert {key: many[key] for key in many if key != "needs"} == {key: alone[key] for key in alone if key != "needs"}
    config = json.loads((llama / "config.json").read_text())
    hidden, mlp, blocks = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    down = hidden if method == "lord" else mlp  # of its outputs, where those suffice
    numbers = 3 * (2 + hidden + hidden**2) + (2 + mlp + down**2)
    if method == "ecsq":
        numbers += 3 * (hidden**2 + 1) + 2 * (narrow**2 + 1) + 2 * (mlp**2 + 1)
    own = 0 if method != "eora" else sum(target["bytes"] for target in many["targets"]) // 8
    needs = many["needs"]
    assert needs["traffic_bytes"] == 8 * blocks * numbers + own
    assert (needs["nodes"], needs["devices"], alone["needs"]["traffic_bytes"]) == (2, 4, 0)
    assert needs["seconds"] < alone["needs"]["seconds"]
    said = str(Needs(**needs))
    assert "in each of 8 processes (2 x 4)" in said
    assert "over the network" in said


@pytest.mark.parametrize(
    ("nodes", "devices", "match"), [(0, 1, "--nodes 0"), (1, -2, "--devices -2"), (4, 4, "too few")]
)
def test_plans_for_no_machine_or_too_many_are_refused(llama, nodes, devices, match):
    with pytest.raises(InputError, match=match):
        make_plan(recipe(llama), nodes=nodes, devices=devices)


@pytest.mark.parametrize(
    "arguments", [["methods"], ["eval", "MODEL"], ["compress", "MODEL", "--method", "lord", "--ratio", "0.3"]]
)
def test_one_of_several_that_torchrun_did_not_start_says_so(monkeypatch, llama, tmp_path, arguments):
    """A scheduler's WORLD_SIZE, or torchrun before a command that is the work of one process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_cli(*(str(llama) if one == "MODEL" else one for one in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "torchrun" in done.stderr
    assert not list(tmp_path.iterdir())


def test_sums_need_no_peers():
    value = torch.ones(2)
    Processes().add_up([value])
    assert value.tolist() == [1.0, 1.0]
    assert Processes().least(3) == 3
