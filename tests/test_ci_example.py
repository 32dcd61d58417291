"""The GitHub Actions examples: well-formed, and their own commands run."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
EXAMPLE, WEEKLY = ROOT / "recipes/ci/github-actions.yml", ROOT / "recipes/ci/architectures.yml"


def read(path):
    # YAML 1.1 reads the key `on` as true; GitHub does not.
    return yaml.load(path.read_text(encoding="utf8"), Loader=yaml.BaseLoader)


@pytest.fixture(scope="module")
def workflow():
    return read(EXAMPLE)


@pytest.mark.parametrize("path", [EXAMPLE, WEEKLY], ids=lambda path: path.name)
def test_it_is_a_workflow(path):
    text, workflow = path.read_text(encoding="utf8"), read(path)
    assert set(workflow) == {"name", "on", "permissions", "jobs"}
    assert all(line == line.rstrip() and "\t" not in line and len(line) <= 120 for line in text.splitlines())
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert set(step) <= {"name", "uses", "run", "with", "if"}
            assert "uses" not in step or step["uses"].count("@") == 1


@pytest.mark.parametrize(("limit", "code"), [pytest.param("1e9", 0, marks=pytest.mark.slow), ("1.0", 1)])
def test_its_commands_run(workflow, llama, tmp_path, limit, code):
    (job,) = workflow["jobs"].values()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {llama}\nmethod: lord\nratio: 0.2\noutput: ignored\n"
        "calibration: {source: python-docs, samples: 4, seqlen: 64}\n"
        "evaluate: {tasks: ['tokens:python-docs@64'], against: dense, limit: 2}\n"
        f"expect: [token_perplexity <= {limit}, stored_ratio >= 0.2]\n"
    )
    page = tmp_path / "page.md"
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "lrcompress").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lrcompress "$@"\n')
    (bin_folder / "lrcompress").chmod(0o755)
    env = {**os.environ, **job["env"], "RECIPE": str(recipe), "GITHUB_STEP_SUMMARY": str(page)}
    env["PATH"] = f"{bin_folder}:{env['PATH']}"
    env["PYTHONPATH"] = str(EXAMPLE.parent.parent.parent)
    ours = [step for step in job["steps"] if "lrcompress" in step.get("run", "") and "pip" not in step["run"]]
    assert len(ours) == 2
    codes = [
        subprocess.run(["bash", "-e", "-c", s["run"]], cwd=tmp_path, env=env, check=False).returncode for s in ours
    ]
    assert codes == [code, 0]
    assert page.read_text().startswith("#")
    assert len(ET.parse(tmp_path / "build/gates.xml").findall(".//failure")) == code
    assert "<html" in (tmp_path / "build/report.html").read_text()
    cached = [path.name for path in (tmp_path / ".lrcompress-cache").iterdir()]
    assert {"evaluations", "statistics"} <= set(cached) <= {"evaluations", "kernels", "statistics"}


def test_a_new_transformers_is_tried_once_a_week(tmp_path):
    """The step's own command, on one type; one that is wrong would end it with code 1."""
    workflow = read(WEEKLY)
    assert workflow["on"]["schedule"][0]["cron"].split()[-1] == "1"
    (job,) = workflow["jobs"].values()
    (step,) = [step for step in job["steps"] if "benchmarks.architectures" in step.get("run", "")]
    table = tmp_path / "architectures.md"
    command = step["run"].replace("python ", f"{sys.executable} ", 1).replace("build/architectures.md", str(table))
    done = subprocess.run(
        ["bash", "-ec", f"{command} --only llama --methods auto --processes 1"], cwd=ROOT, check=False
    )
    assert done.returncode == 0
    (row,) = (line for line in table.read_text().splitlines() if "`llama`" in line)
    assert row.startswith("| causal | `llama` | right |")
