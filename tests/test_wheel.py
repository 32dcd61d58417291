"""A wheel built from the tree, installed where nothing of the tree is, runs the quickstart."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import needs_demo

ROOT = Path(__file__).parent.parent


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
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree)
    shutil.rmtree(tree)
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
    sources |= {f"lrcompress/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    own = {name for name in names if ".dist-info/" not in name}
    assert sources <= own
    assert {name.split("/")[0] for name in own} == {"lrcompress"}


@needs_demo
@pytest.mark.demo
def test_the_quickstart_runs_from_a_wheel(installed, tmp_path):
    """Its size reduced, and its expectation on quality with it."""
    python, _ = installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    how = {"cwd": tmp_path, "env": environment}
    where = run(python, "-c", "import lrcompress; print(lrcompress.__file__)", **how).strip()
    assert Path(where).is_relative_to(python.parent.parent)
    smaller = [
        "calibration.samples=2",
        "calibration.seqlen=64",
        "evaluate.limit=1",
        r"target=['re:layers\.17\.self_attn']",
    ]
    smaller += ["evaluate.tasks=[tokens:python-docs@64]", "expect=[token_perplexity <= 1e9, stored_ratio >= 0.1]"]
    changes = [part for change in smaller for part in ("--set", change)]
    run(python.parent / "lrcompress", "run", "quickstart", "-o", tmp_path / "out", *changes, **how)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["ratio"]["stored"] >= 0.1
