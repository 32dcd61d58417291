"""The GitHub Actions example: well-formed, and its own commands run."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

EXAMPLE = Path(__file__).parent.parent / "recipes/ci/github-actions.yml"


@pytest.fixture(scope="module")
def workflow():
    # YAML 1.1 reads the key `on` as true; GitHub does not.
    data = yaml.load(EXAMPLE.read_text(encoding="utf8"), Loader=yaml.BaseLoader)
    assert set(data) == {"name", "on", "permissions", "jobs"}
    return data


def test_it_is_a_workflow(workflow):
    text = EXAMPLE.read_text(encoding="utf8")
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
    assert sorted(cached) == ["evaluations", "statistics"]
