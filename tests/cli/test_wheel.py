"""A wheel built from the tree's source archive, installed where nothing of the tree is, runs the quickstart."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.conftest import needs_demo

ROOT = Path(__file__).parent.parent.parent


def run(*command, **how):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False, **how)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment that has the wheel, and the dependencies of this one, but nothing of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("lrcompress", "recipes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=tree)
    shutil.rmtree(tree)
    (archive,) = folder.glob("lrcompress-*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, archive)
    (wheel,) = folder.glob("lrcompress-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A folder that a .pth file names is searched, but its own .pth files, one of which leads to the tree, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, wheel


def test_a_wheel_has_what_runs_and_nothing_else(installed):
    _, wheel = installed
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lrcompress").rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    sources = {name.removeprefix("lrcompress/") if name.endswith(".pth") else name for name in sources}
    sources |= {f"lrcompress/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    own = {name for name in names if ".dist-info/" not in name}
    assert sources <= own
    assert {name.split("/")[0] for name in own} == {"lrcompress", "lrcompress.pth"}


def without_the_tree(python, folder, **changes):
    """The environment of commands that find the wheel's `lrcompress` in their path."""
    environment = {**os.environ, **changes, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    del environment["PYTHONPATH"]
    how = {"cwd": folder, "env": environment}
    where = run(python, "-c", "import lrcompress; print(lrcompress.__file__)", **how).strip()
    assert Path(where).is_relative_to(python.parent.parent)
    return how


def test_a_program_that_knows_nothing_of_us_loads_our_checkpoints(installed, compressed, tmp_path):
    python, _ = installed
    how = without_the_tree(python, tmp_path)
    code = "import sys; from transformers import AutoModelForCausalLM as auto; " \
           "print(type(auto.from_pretrained(sys.argv[1]).model.layers[0].self_attn.q_proj).__module__)"  # fmt: skip
    assert run(python, "-c", code, compressed(), **how).split() == ["lrcompress.formats.pivoted"]
    loaded = run(python, "-c", "import sys; print({'torch', 'transformers', 'importlib.util'} & {*sys.modules})", **how)
    assert loaded.strip() == "set()", "every Python would take that long to begin"


@pytest.mark.parametrize(("limit", "code"), [pytest.param("1e9", 0, marks=pytest.mark.slow), ("1.0", 1)])
def test_the_commands_of_the_ci_example_run(installed, llama, tmp_path, limit, code):
    python, _ = installed
    (job,) = yaml.safe_load((ROOT / "recipes/ci/github-actions.yml").read_text())["jobs"].values()
    recipe, page = tmp_path / "recipe.yaml", tmp_path / "page.md"
    recipe.write_text(
        f"model: {llama}\nmethod: lord\nratio: 0.2\noutput: ignored\n"
        "calibration: {source: python-docs, samples: 4, seqlen: 64}\n"
        "evaluate: {tasks: ['tokens:python-docs@64'], against: dense, limit: 2}\n"
        f"expect: [token_perplexity <= {limit}, stored_ratio >= 0.2]\n"
    )
    how = without_the_tree(python, tmp_path, **{**job["env"], "RECIPE": str(recipe), "GITHUB_STEP_SUMMARY": str(page)})
    ours = [step["run"] for step in job["steps"] if "lrcompress" in step.get("run", "") and "pip" not in step["run"]]
    assert len(ours) == 2
    done = [subprocess.run(["bash", "-e", "-c", commands], check=False, **how).returncode for commands in ours]
    assert done == [code, 0]
    assert page.read_text().startswith("#")
    assert len(ElementTree.parse(tmp_path / "build/gates.xml").findall(".//failure")) == code
    assert "<html" in (tmp_path / "build/report.html").read_text()
    cached = {path.name for path in (tmp_path / ".lrcompress-cache").iterdir()}
    assert {"evaluations", "statistics"} <= cached <= {"evaluations", "kernels", "statistics"}


@needs_demo
@pytest.mark.demo
@pytest.mark.slow
def test_the_quickstart_runs(installed, tmp_path):
    """Its size reduced, and its expectation on quality with it; .ci/run calls this one too."""
    python, _ = installed
    smaller = [
        "calibration.samples=2",
        "calibration.seqlen=64",
        r"target=['re:layers\.17\.self_attn']",
        "evaluate.limit=1",
    ]
    smaller += ["evaluate.tasks=[tokens:python-docs@64]", "expect=[token_perplexity <= 1e9, stored_ratio >= 0.1]"]
    changes = [part for change in smaller for part in ("--set", change)]
    how = without_the_tree(python, tmp_path)
    run(python.parent / "lrcompress", "run", "quickstart", "-o", tmp_path / "out", *changes, **how)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["ratio"]["stored"] >= 0.1
    assert all(found["met"] for found in report["evaluation"]["expectations"])
