"""Compressed checkpoints to export, made once per session."""

import json

import pytest

from tests.conftest import compress_tiny


@pytest.fixture(scope="session")
def compressed(make_model, tmp_path_factory):
    """compressed(architecture, **recipe): a folder that compress wrote."""
    made = {}

    def make(architecture="llama", **recipe):
        key = (architecture, json.dumps(recipe, sort_keys=True))
        if key not in made:
            folder = tmp_path_factory.mktemp("out") / "model"
            compress_tiny(make_model(architecture), folder, **recipe)
            made[key] = folder
        return made[key]

    return make
