"""The GitHub Actions examples: well-formed, and their own commands run; those of the first in cli/test_wheel.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
EXAMPLE, WEEKLY = ROOT / "recipes/ci/github-actions.yml", ROOT / "recipes/ci/architectures.yml"


def read(path):
    # YAML 1.1 reads the key `on` as true; GitHub does not.
    return yaml.load(path.read_text(encoding="utf8"), Loader=yaml.BaseLoader)


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
