"""A finished checkpoint that was measured beside its dense model, made once."""

import shutil

import pytest

from lrcompress.recipe import make_recipe
from lrcompress.run import run_recipe


@pytest.fixture(scope="session")
def measured(llama, once):
    """A folder with weights of several formats, report.json with evaluation, a met expectation and a missed one."""
    recipe = {
        "model": str(llama),
        "method": "lord",
        "ratio": 0.4,
        "ignore": ["*.0.mlp.*"],
        "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64},
        "evaluate": {"tasks": ["tokens:python-docs@32"], "limit": 3, "against": "dense"},
        "expect": ["token_perplexity <= 1000 * against", "stored_ratio >= 0.9"],
    }
    return once("measured", lambda folder: run_recipe(make_recipe({**recipe, "output": str(folder)})))


@pytest.fixture
def checkpoint(measured, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(measured, tmp_path / "checkpoint")
