"""lm-eval's own command line and Python call on our checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from lrcompress.evaluation.compare import evaluate
from lrcompress.recipe import EvaluateSpec
from tests.conftest import compress_tiny


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"{w} is", "choices": [" red", " blue", " stone"], "gold": len(w) % 3}
        for w in "river tree house bird light a of".split()
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "colour.yaml").write_text(
        f"task: colour\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder / "colour.yaml"


def test_the_command_line_and_the_call_give_what_eval_gives(llama, task_file, tmp_path):
    small = compress_tiny(llama, tmp_path / "small").folder
    expected = evaluate(str(small), EvaluateSpec(tasks=[f"tasks:{task_file}"]))["results"]["colour"]
    command = [sys.executable, "-m", "lrcompress.lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={small},dtype=float32",
               "--tasks", task_file, "--device", "cpu", "--batch_size", "1", "--output_path", tmp_path / "out"]  # fmt: skip
    # In a folder of its own, so that the package and lm-eval are found by their names alone.
    (tmp_path / "cwd").mkdir()
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path / "cwd", env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["colour"]
    called = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(small), "dtype": "float32"}, device="cpu", batch_size=1, tasks=["colour"],
        task_manager=TaskManager(include_path=str(task_file.parent), include_defaults=False),
    )["results"]["colour"]  # fmt: skip
    for metric in ("acc", "acc_norm", "acc_stderr"):
        assert written[f"{metric},none"] == called[f"{metric},none"] == pytest.approx(expected[metric])
