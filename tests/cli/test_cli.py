"""The command line through real processes: exit codes, one-line errors, untouched files."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrcompress.cli.show_bench import _bench_table
from lrcompress.methods import METHODS
from lrcompress.recipe import load_recipe, shipped_recipes
from lrcompress.report.summary import block_kinds, kinds_table
from tests.commands import run_cli, start_cli

QUICK = ["--samples", "2", "--seqlen", "32"]


def compress(model, output, *extra, method="lord", ratio="0.2", **how):
    return run_cli("compress", model, "--method", method, "--ratio", ratio, "-o", output, *QUICK, *extra, **how)


def tree(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys, lrcompress.cli as c\n"
        "sys.argv = ['lrcompress', '--help']\n"
        "try:\n    c.main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    best = 9.0
    for _ in range(4):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lrcompress", "--help"], check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    assert best < 1.0


COMMANDS = ["compress", "plan", "eval", "run", "sweep", "export", "inspect", "report", "methods", "cache"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    done = run_cli(command, "--help")
    assert done.returncode == 0
    assert done.stdout


def test_shell_completion():
    environment = {
        **os.environ,
        "_LRCOMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": "lrcompress comp",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv=['lrcompress']; from lrcompress.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "compress" in done.stdout.split()


def test_methods_lists_the_registry(tmp_path):
    shown = run_cli("methods").stdout
    assert "arxiv.org" in shown
    assert max(map(len, shown.splitlines())) <= 80
    listed = json.loads(run_cli("methods", "--json", "-").stdout)
    assert {m["name"] for m in listed["methods"]} >= {"lord", "welore"}
    assert all({"paper", "formats", "options", "allocator"} <= m.keys() for m in listed["methods"])
    assert {b["example"] for b in listed["bases"]} >= {"rtn:4:64", "gptq:3:64", "wanda:2:4"}


def test_compress_plan_inspect_eval(llama, tmp_path):
    out, report = tmp_path / "out", tmp_path / "r.json"
    done = compress(llama, out, "--json", report)
    assert done.returncode == 0, done.stderr
    assert "removed" in done.stdout
    assert "calibrate and decompose" in done.stderr
    assert json.loads(report.read_text())["ratio"]["asked"] == 0.2
    assert json.loads(report.read_text()) == json.loads((out / "report.json").read_text())
    planned = run_cli("plan", llama, "--method", "lord", "--ratio", "0.2", *QUICK, "--json", tmp_path / "p.json")
    assert planned.returncode == 0
    assert [t["bytes"] for t in json.loads((tmp_path / "p.json").read_text())["targets"]] == [
        t["bytes"] for t in json.loads(report.read_text())["targets"]
    ]
    inspected = run_cli("inspect", out, "--spectra", "--json", tmp_path / "i.json")
    assert inspected.returncode == 0, inspected.stderr
    assert "pivoted" in inspected.stdout
    assert "bytes removed, block by block" in inspected.stdout
    assert "bytes removed" not in run_cli("inspect", llama).stdout
    targets = json.loads((tmp_path / "i.json").read_text())["targets"]
    assert {t["name"]: t["bytes"] for t in targets} == {
        t["name"]: t["bytes"] for t in json.loads(report.read_text())["targets"]
    }
    rank = targets[0]["rank"]
    assert targets[0]["spectrum"][-1] < 1e-4 * targets[0]["spectrum"][0] or rank == min(targets[0]["shape"])
    dense = json.loads(run_cli("inspect", llama, "--quiet", "--json", "-").stdout)
    assert [t["name"] for t in dense["targets"]] == [t["name"] for t in targets]
    for limit, code in (("1e9", 0), ("1.0", 1)):
        judged = run_cli(
            "eval", out, "--tasks", "tokens:python-docs@32", "--limit", 4, "--against", llama,
            "--expect", f"token_perplexity <= {limit}", "--json", tmp_path / "e.json",
        )  # fmt: skip
        assert judged.returncode == code, judged.stderr
        result = json.loads((tmp_path / "e.json").read_text())
        assert result["expectations"][0]["met"] is (code == 0)
        assert result["against"]["results"]["tokens:python-docs@32"]["token_perplexity"] > 0


@pytest.mark.parametrize(
    ("culprit", "arguments"),
    [
        ("nowhere", ["nowhere", "--method", "lord", "--ratio", "0.2"]),
        ("welore", ["MODEL", "--method", "weelore", "--ratio", "0.2"]),
        ("1.5", ["MODEL", "--method", "lord", "--ratio", "1.5"]),
        ("0", ["MODEL", "--method", "lord", "--ratio", "0"]),
        ("nothing.*", ["MODEL", "--method", "lord", "--ratio", "0.2", "--target", "nothing.*"]),
        ("re:(", ["MODEL", "--method", "lord", "--ratio", "0.2", "--ignore", "re:("]),
        ("nope.txt", ["MODEL", "--method", "lord", "--ratio", "0.2", "--calibration", "nope.txt"]),
        ("tiny.txt", ["MODEL", "--method", "lord", "--ratio", "0.2", "--calibration", "tiny.txt"]),
        ("uniform", ["MODEL", "--method", "lord", "--ratio", "0.2", "--allocator", "uniforn"]),
        ("pivoted", ["MODEL", "--method", "lord", "--ratio", "0.2", "--format", "pivotted"]),
        ("metric", ["MODEL", "--method", "lord", "--ratio", "0.2", "--set", "metrik=plain"]),
        ("warp", ["MODEL", "--method", "lord", "--ratio", "0.2", "--device", "warp"]),
        ("float12", ["MODEL", "--method", "lord", "--ratio", "0.2", "--dtype", "float12"]),
        ("at most", ["MODEL", "--method", "lord", "--ratio", "0.9999"]),
        ("used", ["MODEL", "--method", "lord", "--ratio", "0.2", "-o", "used"]),
        ("file.txt", ["MODEL", "--method", "lord", "--ratio", "0.2", "-o", "file.txt"]),
        ("say how small: --bpw 3", ["MODEL", "--method", "lord"]),
        ("--rank 3", ["MODEL", "--method", "lord", "--rank", "3"]),
        ("--base", ["MODEL", "--method", "welore", "--ratio", "0.2", "--base", "rtn:4:64"]),
        ("both", ["MODEL", "--method", "eora", "--ratio", "0.2", "--rank", "3"]),
        ("rank = -3", ["MODEL", "--method", "eora", "--rank", "-3"]),
        ("rtn:BITS:GROUP", ["MODEL", "--method", "eora", "--rank", "3", "--base", "rtn:5:64"]),
        ("'gptq'", ["MODEL", "--method", "eora", "--rank", "3", "--base", "gtpq:4:64"]),
        ("is a dense checkpoint", ["MODEL", "--method", "eora", "--rank", "3", "--base", "MODEL"]),
        ("act_order", ["MODEL", "--method", "eora", "--rank", "3", "--base", "wanda:2:4", "--set", "act_order=true"]),
        ("at most 0.", ["MODEL", "--method", "eora", "--ratio", "0.95", "--base", "rtn:4:16"]),
    ],
)
def test_bad_usage_names_the_culprit_and_writes_nothing(llama, tmp_path, culprit, arguments):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "keep.txt").write_text("mine")
    (tmp_path / "tiny.txt").write_text("too short")
    (tmp_path / "file.txt").write_text("a file")
    before = tree(tmp_path)
    arguments = [str(llama) if a == "MODEL" else a for a in arguments]
    output = [] if "-o" in arguments else ["-o", "out"]
    done = run_cli("compress", *arguments, *output, *QUICK, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert culprit in done.stderr
    assert tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "tiny.txt", "used"]


def test_without_a_method_it_is_auto(llama, tmp_path):
    done = run_cli("plan", llama, "--bpw", "4", *QUICK, "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["method"] == "auto"
    assert 3.9 < plan["ratio"]["bpw"] <= 4


def test_eora_by_rank_into_its_default_folder(llama, tmp_path):
    done = run_cli("compress", llama, "--method", "eora", "--base", "rtn:3:16", "--rank", "2", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / f"{llama.name}-eora-rtn-3-16-r2"
    report = json.loads((out / "report.json").read_text())
    assert report["ratio"]["asked"] is None
    assert {t["format"] for t in report["targets"]} == {"sum"}
    planned = run_cli("plan", llama, "--method", "eora", "--base", "rtn:3:16", "--rank", "2", "--json", "-", "--quiet")
    assert json.loads(planned.stdout)["bytes"]["targets_stored"] == report["bytes"]["targets_stored"]
    assert run_cli("inspect", out, "--spectra").returncode == 0
    files = [load_file(folder / "model.safetensors") for folder in (llama, out)]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) / 1e6 for tensors in files]
    times = report["held_out"]["perplexity"] / report["held_out"]["before"]
    *_, wrote, last = done.stdout.splitlines()
    assert wrote == f"wrote {out.name}"
    assert last == (
        f"{sizes[0]:.2g} → {sizes[1]:.2g} MB, perplexity × {times:.2f} on 1 window of held-out calibration text; "
        f"next: lrcompress eval {out.name} --tasks YOUR.txt"
    )
    measured = run_cli("eval", out, "--tasks", "tokens:python-docs@32", "--limit", 2, "--json", tmp_path / "e.json")
    assert measured.returncode == 0, measured.stderr
    found, kept = (json.loads((tmp_path / name).read_text()) for name in ("e.json", f"{out.name}/report.json"))
    assert found["against"]["model"] == str(llama)
    assert kept["evaluation"]["results"] == found["results"]
    assert f"{found['results']['tokens:python-docs@32']['token_perplexity']:.4f}" in (out / "README.md").read_text()
    alone = run_cli("eval", out, "--tasks", "tokens:python-docs@64", "--limit", 2, "--against", "none")
    assert alone.returncode == 0
    both = json.loads((out / "report.json").read_text())["evaluation"]  # beside what was compared with the dense model
    assert both["results"].keys() == {"tokens:python-docs@32", "tokens:python-docs@64"}
    assert both["against"] == found["against"]
    again = run_cli("eval", out, "--tasks", "tokens:python-docs@32", "--limit", 1, "--against", "none")
    assert again.returncode == 0
    other = json.loads((out / "report.json").read_text())["evaluation"]
    assert other["results"]["tokens:python-docs@32"]["blocks"] == 1
    assert other["against"]["results"] == other["against"]["tests"] == {}  # they were those of other windows
    assert run_cli("run", out / "recipe.yaml", "-o", tmp_path / "again").returncode == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_export_a_correction_to_peft(llama, tmp_path):
    out = tmp_path / "out"
    run_cli("compress", llama, "--method", "eora", "--base", "rtn:3:16", "--rank", "2", "-o", out, *QUICK)
    done = run_cli("export", out, "--to", "peft", "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exported 21 layers to peft" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["layers"] == 21
    assert result["bytes"]["adapter"] == (tmp_path / "out-peft/adapter_model.safetensors").stat().st_size
    assert run_cli("inspect", tmp_path / "out-peft/base").returncode == 0
    before = tree(tmp_path)
    for culprit, arguments in (
        ("--overwrite", [out, "--to", "peft"]),
        ("peft", [out, "--to", "pfet", "-o", "new"]),
        ("not compressed", [llama, "--to", "peft", "-o", "new"]),
        ("nowhere", ["./nowhere", "--to", "peft", "-o", "new"]),
        ("5 apples", [out, "--to", "peft", "--shard-size", "5 apples", "-o", "new"]),
    ):
        done = run_cli("export", *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert culprit in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert tree(tmp_path) == before
    quiet = run_cli("export", out, "--to", "peft", "--overwrite", "--quiet", cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_export_to_a_dense_checkpoint(llama, tmp_path):
    out = tmp_path / "out"
    assert compress(llama, out, "--set", "metric=input").returncode == 0
    done = run_cli("export", out, "--to", "dense", "--dtype", "bfloat16", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert (result["to"], result["dtype"], result["layers"], result["switches"]) == ("dense", "bfloat16", 21, [])
    judged = run_cli("eval", tmp_path / "out-dense", "--against", out, "--tasks", "tokens:python-docs@32", "--limit", 4,
                     "--expect", "token_perplexity <= 1.01 * against", "--expect", "stored_ratio <= 0")  # fmt: skip
    assert judged.returncode == 0, judged.stdout + judged.stderr
    before = tree(tmp_path)
    for culprit, arguments in (
        ("float8", [out, "--to", "dense", "--dtype", "float8", "-o", "new"]),
        ("--dtype", [out, "--to", "peft", "--dtype", "float16", "-o", "new"]),
        ("no correction", [out, "--to", "peft", "-o", "new"]),
        ("gguf", ["demo.gguf", "--to", "dense", "-o", "new"]),
    ):
        done = run_cli("export", *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert culprit in done.stderr
        assert "Traceback" not in done.stderr
    assert tree(tmp_path) == before


def test_an_export_onto_a_full_disk_leaves_nothing(llama, tmp_path):
    out = tmp_path / "out"
    assert compress(llama, out).returncode == 0
    done = run_cli("export", out, "--to", "dense", cwd=tmp_path, largest_file=60_000)
    assert done.returncode == 3, done.stderr
    assert "full" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def damaged(model, folder, change):
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt_header(folder):
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:40] = b"\x00" * 32
    path.write_bytes(raw)


def huge_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((10**18).to_bytes(8, "little") + path.read_bytes()[8:])


def nan_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lost_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "perpetuum"}')


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (cut, "model.safetensors"),
        (corrupt_header, "model.safetensors"),
        (huge_header, "model.safetensors"),
        (nan_weight, "model.layers.1.mlp.up_proj.weight"),
        (lost_tensor, "model.layers.1.mlp.up_proj.weight"),
        (no_config, "config"),
        (broken_config, "config"),
        (unknown_type, "perpetuum"),
        (no_tokenizer, "tokenizer"),
    ],
)
def test_damaged_checkpoints_are_refused(llama, tmp_path, change, culprit):
    folder = damaged(llama, tmp_path / "model", change)
    done = compress(folder, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert culprit in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) < 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_overwrite_replaces_and_a_failure_leaves_the_old_one(llama, tmp_path):
    out = tmp_path / "out"
    assert compress(llama, out).returncode == 0
    before = tree(out)
    assert compress(llama, out).returncode == 2
    broken = damaged(llama, tmp_path / "model", nan_weight)
    assert compress(broken, out, "--overwrite").returncode == 2
    assert tree(out) == before
    assert compress(llama, out, "--overwrite", ratio="0.4").returncode == 0
    assert json.loads((out / "report.json").read_text())["ratio"]["asked"] == 0.4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_full_disk_is_exit_code_3_and_leaves_nothing_half_written(llama, tmp_path):
    done = compress(llama, tmp_path / "out", largest_file=60_000)
    assert done.returncode == 3, done.stderr
    assert "full" in done.stderr
    assert not (tmp_path / "out").exists()
    assert compress(llama, tmp_path / "out", "--resume").returncode == 0


LONG = ["--samples", "96", "--seqlen", "64"]


def start(model, output, *extra):
    return start_cli("compress", model, "--method", "lord", "--ratio", "0.2", "-o", output, *LONG, *extra)


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition() and process.running and time.time() < end:
        time.sleep(0.01)


def test_interrupted_with_ctrl_c_and_resumed(llama, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(llama, out)
    wait_for(lambda: list(partial.glob("scratch/artefacts/*.safetensors")), process)
    process.send(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130, done.stderr
    assert "--resume" in done.stderr
    assert not out.exists()
    assert partial.exists()
    changed = start(llama, out, "--resume", "--seed", "7").wait()
    assert changed.returncode == 2
    assert "changed since" in changed.stderr
    assert start(llama, out, "--resume").wait().returncode == 0
    assert not partial.exists()


@pytest.fixture(scope="module")
def undisturbed(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert start(llama, folder).wait().returncode == 0
    return folder


@pytest.mark.parametrize(
    "moment", ["scratch/artefacts/block-00001.safetensors", "config.json", "scratch/journal-0.json"]
)
def test_killed_and_resumed_gives_the_same_bytes(llama, tmp_path, undisturbed, moment):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(llama, out)
    wait_for((partial / moment).exists, process)
    process.send(signal.SIGKILL)
    process.wait()
    assert start(llama, out, "--resume").wait().returncode == 0
    for path in undisturbed.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    again = compress(llama, out, "--resume", *LONG)
    assert again.returncode == 0
    assert "finished already" in again.stderr


def test_two_runs_into_one_folder(llama, tmp_path):
    process = start(llama, tmp_path / "out")
    wait_for((tmp_path / "out.partial/scratch").exists, process)
    process.send(signal.SIGSTOP)
    second = compress(llama, tmp_path / "out")
    assert second.returncode == 2
    assert "another run" in second.stderr
    process.send(signal.SIGCONT)
    assert process.wait().returncode == 0


def recipe(tmp_path, llama, **changes):
    data = {
        "model": str(llama), "method": {"name": "lord"}, "ratio": 0.2, "output": str(tmp_path / "out"),
        "calibration": {"source": "python-docs", "samples": 2, "seqlen": 32},
        "evaluate": {"tasks": ["tokens:python-docs@32"], "against": "dense", "limit": 2},
        "expect": ["token_perplexity <= 1e9", "stored_ratio >= 0.2"], **changes,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return path


def test_run_a_recipe(llama, tmp_path):
    path = recipe(tmp_path, llama)
    done = run_cli("run", path)
    assert done.returncode == 0, done.stderr
    assert "met token_perplexity" in done.stdout
    card = (tmp_path / "out/README.md").read_text()
    assert "## Measured" in card
    again = run_cli("run", tmp_path / "out/recipe.yaml", "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    first, second = (tmp_path / d / "model.safetensors" for d in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    junit, summary = tmp_path / "j.xml", tmp_path / "s.md"
    missed = run_cli(
        "run", path, "--set", "expect.0=token_perplexity <= 1.0", "--overwrite", "--junit", junit, "--summary", summary
    )
    assert missed.returncode == 1
    assert (tmp_path / "out/report.json").exists()
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert "1.0" in suite.find(".//failure/..").get("name")
    assert "**missed**" in summary.read_text()


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"rato": 0.2, "ratio": None}, "'ratio'"),
        ({"calibration": {"sorce": "c4"}}, "'source'"),
        ({"ratio": 2}, "ratio"),
        ({"method": {"name": "lord", "metrc": "plain"}}, "'metric'"),
        ({"expect": ["nonsense"]}, "nonsense"),
        ({"evaluate": {"tasks": ["tokens:nope.txt@8"]}}, "nope.txt"),
        ({"evaluate": None}, "evaluates nothing"),
        ({"method": None}, "'method' is missing"),
        ({"expect": ["token_perplexty <= 9"]}, "'token_perplexity'"),
        ({"expect": ["tokens:python-docs@64:token_perplexity <= 9"]}, "was not measured"),
        ({"expect": ["stored_ratio >= nan"]}, "finite"),
        (
            {"expect": ["token_perplexity <= 2 * against"], "evaluate": {"tasks": ["tokens:python-docs@32"]}},
            "--against",
        ),
        ({"evaluate": {"tasks": ["arc_eazy"]}}, "'arc_easy'"),
        ({"evaluate": {"tasks": ["piqa"]}, "expect": ["f1 >= 0.1"]}, "'f1 >= 0.1': f1 was not measured"),
        ({"evaluate": {"tasks": ["tokens:python-docs@32"], "against": "no/where/at/all"}}, "no/where/at/all"),
        ({"evaluate": {"tasks": ["tokens:python-docs@32"], "against": "EMPTY"}}, "config.json"),
    ],
)
def test_a_bad_recipe_fails_before_anything_loads(llama, tmp_path, changes, hint):
    (tmp_path / "EMPTY").mkdir()
    before = {**tree(tmp_path), str(recipe(tmp_path, llama, **changes)): (tmp_path / "recipe.yaml").read_bytes()}
    done = run_cli("run", "recipe.yaml", "--junit", "j.xml", "--summary", "s.md", cwd=tmp_path)
    assert done.returncode == 2
    assert hint in done.stderr
    assert len(done.stderr.splitlines()) == 1, "nothing was begun"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["--junit", "--summary", "--json"])
def test_run_refuses_a_file_that_cannot_be_written_before_anything_loads(llama, tmp_path, option):
    done = run_cli("run", recipe(tmp_path, llama), option, tmp_path / "nowhere/file")
    assert done.returncode == 2
    assert f"{option} {tmp_path}/nowhere/file cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_later_says_so_in_its_files(llama, tmp_path):
    path = recipe(tmp_path, llama, expect=["bytes < 12MB", "kl <= 1"], output=str(tmp_path / "in/out"))
    done = run_cli("run", path, "--set", "memory=1MB", "--junit", tmp_path / "in/j.xml", "--summary", tmp_path / "s.md")
    assert done.returncode == 3, done.stderr
    said = done.stderr.splitlines()[-1].removeprefix("error: ")
    suite = ElementTree.parse(tmp_path / "in/j.xml").getroot().find("testsuite")
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["3", "0", "1", "2"]
    assert said == suite.find(".//error").get("message")
    assert [case.get("name") for case in suite.iter("testcase")] == ["run", "bytes < 12MB", "kl <= 1"]
    assert said in (tmp_path / "s.md").read_text()


def test_save_recipe_writes_the_command_line(llama, tmp_path):
    saved = tmp_path / "saved.yaml"
    assert (
        compress(llama, tmp_path / "a", "--save-recipe", saved, "--ignore", "*.0.*", "--set", "metric=input").returncode
        == 0
    )
    assert run_cli("run", saved, "-o", tmp_path / "b").returncode == 0
    assert torch.equal(*(load_file(tmp_path / d / "model.safetensors")["model.norm.weight"] for d in "ab"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_schema_and_shipped_recipes():
    schema = json.loads(run_cli("run", "--schema").stdout)
    assert schema["properties"].keys() >= {"model", "method", "ratio", "calibration", "expect"}
    for name in shipped_recipes().keys() - {"sweep"}:
        assert load_recipe(name, []).output
    assert shipped_recipes().keys() >= {"quickstart", "sweep", "eora-gptq3", *METHODS.names()}
    unknown = run_cli("run", "quickstrat")
    assert unknown.returncode == 2
    assert "quickstart" in unknown.stderr


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("compress", ["--method", "lord", "--ratio", "0.2", "--save-recipe", "no/where.yaml"]),
        ("compress", ["--method", "lord", "--ratio", "0.2", "--json", "no/where.json"]),
        ("plan", ["--method", "lord", "--ratio", "0.2", "--json", "no/where.json"]),
        ("eval", ["--json", "no/where.json"]),
        ("inspect", ["--json", "no/where.json"]),
        ("export", ["--to", "dense", "--json", "no/where.json"]),
        ("squeeze", ["--rank", "2", "--json", "no/where.json"]),
        ("heal", ["--json", "no/where.json"]),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, command, more):
    """Before the model is even opened: its folder is empty."""
    (tmp_path / "model").mkdir()
    done = run_cli(command, "model", *more, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "no/where" in done.stderr
    assert "there is no such folder" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["model"]


def test_a_full_disk_is_a_lack_of_a_resource(llama, tmp_path):
    done = compress(llama, tmp_path / "out", "--json", "/dev/full")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: the disk of /dev is full")
    inside = compress(llama, tmp_path / "new/out", "--json", tmp_path / "new/out/result.json")
    assert inside.returncode == 0
    assert json.loads((tmp_path / "new/out/result.json").read_text())["method"] == "lord"


def test_a_model_alone_says_what_could_be_done(llama, compressed, tmp_path):
    done = run_cli(llama, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    model = AutoModelForCausalLM.from_pretrained(llama)
    kinds = {name.split(".", 3)[3]: 0 for name, _ in model.named_modules() if name.endswith("_proj")}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            kinds[name.split(".", 3)[3]] += module.weight.numel()
    numbers = sum(kinds.values())
    whole = sum(tensor.nbytes for tensor in load_file(llama / "model.safetensors").values())
    assert lines[0].startswith(f"{llama}: {whole / 1e6:.4g} MB in float32, 3 blocks")
    for kind, count in kinds.items():
        assert f"{kind} {count / 1e6:.4g}" in lines[1]
    for bits in (8, 4, 3, 2):
        assert f"{(whole - 4 * numbers + numbers * bits / 8) / 1e6:.3g} MB at {bits}" in lines[2]
    assert lines[4] == f"begin: lrcompress compress {llama} --bpw 4 --calibration YOUR.txt"
    done = run_cli(compressed(method="lord"), cwd=tmp_path)
    assert "compressed by lord" in done.stdout
    assert "Did you mean compress?" in run_cli("compres").stderr
    assert "Did you mean demo?" in run_cli("demmo").stderr
    assert "did you mean demo?" in run_cli("plan", "demmo", "--bpw", 3, cwd=tmp_path).stderr
    (tmp_path / "smollm").mkdir()
    for misspelt in ("smolm", "./smolm"):
        assert "did you mean smollm?" in run_cli("inspect", misspelt, cwd=tmp_path).stderr
    assert "No such command" in run_cli("nothing-of-this-name").stderr


def test_the_table_of_coded_weights_takes_80_columns(compressed):
    report = json.loads((compressed(method="ecsq", ratio=None, bpw=4) / "report.json").read_text())
    for target in report["targets"]:
        target["name"] = f"model.layers.{target['name'].split('.')[2]}.self_attn.longer_proj"
    report["targets"][0]["bytes"] = report["targets"][0]["dense_bytes"] = 99 * 10**6  # a large model's
    console = Console(width=80, file=io.StringIO())
    console.print(kinds_table(report, block_kinds([target["name"] for target in report["targets"]])))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert "rank" not in "".join(lines)


def test_a_table_with_ranks_takes_80_columns_and_loses_nothing(compressed):
    report = json.loads((compressed(method="lord") / "report.json").read_text())
    for place, target in enumerate(report["targets"]):
        target["name"] = f"model.layers.{target['name'].split('.')[2]}.self_attn.q_proj"
        target["format"] = ("dense", "low_rank", "sparse_dictionary")[place % 3]
        target["shape"], target["rank"], target["dense_bytes"] = [14336, 4096 - place % 2], 100 + place, 2 * 10**7
    console = Console(width=120, file=io.StringIO(), soft_wrap=True)
    console.print(kinds_table(report, block_kinds([target["name"] for target in report["targets"]])))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = "".join("".join(lines).split())
    last = 99 + len(report["targets"])
    for part in (f"100-{last}", "4095-4096", "low_rank", "dictionary", "self_attn.q_proj", "removed", "error", "bpw"):
        assert part in text.replace("sparse_", ""), part


def test_columns_that_hold_nothing_are_left_out(llama, compressed):
    shown = run_cli("inspect", llama).stdout
    assert "bpw" in shown
    assert not any(name in shown for name in ("rank", "removed", "error"))
    coded = run_cli("inspect", compressed(method="ecsq", ratio=None, bpw=4)).stdout
    assert "removed" in coded
    assert not any(name in coded for name in ("rank", "error"))


def test_an_evaluation_of_nothing_named_says_what_it_takes_and_is_bounded(llama, tmp_path):
    done = run_cli("eval", llama, "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    said = "measuring at most 32 blocks of tokens:python-docs@512, Python's documentation, roughly 0 s a model"
    assert said in done.stderr
    assert "--tasks YOUR.txt" in done.stderr
    (found,) = json.loads((tmp_path / "e.json").read_text())["results"].values()
    assert found["blocks"] == 32
    few = run_cli("eval", llama, "--limit", 2)
    assert "at most 2 blocks" in few.stderr
    assert "(2 blocks)" in " ".join(few.stdout.split())


@pytest.mark.parametrize("both", [True, False])
def test_the_table_of_speeds_takes_80_columns_and_loses_nothing(both):
    """Of figures as long as a small model's and a slow one's."""
    row = {
        "phase": "prefill", "batch": 8, "context": 32768, "speedup": 12.34, "bound": 13.57, "spread": 1.235678,
        "dense_tokens_per_s": 123456.7, "compressed_tokens_per_s": 234567.8,
        "dense_first_token_seconds": 12.345, "compressed_first_token_seconds": 9.876,
    }  # fmt: skip
    if not both:
        row |= {"dense_tokens_per_s": None, "dense_first_token_seconds": None, "speedup": None, "bound": None}
    settings = {"device": "cpu", "dtype": "torch.bfloat16", "threads": 128, "compile": True, "repeats": 5}
    result = {"model": "a/model", "against": "b/model" if both else None, "rows": [row], "settings": settings}
    console = Console(width=80, file=io.StringIO())
    console.print(_bench_table(result))
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    expected = ["prefill", "32768", "234567.8", "123.6%", "9876"] + (
        ["123456.7", "12.34x", "13.57x", "12345/9876"] if both else []
    )
    for text in expected:
        assert text in printed
