"""What the tests of training share."""

import pytest


@pytest.fixture(scope="session")
def corpus(text, tmp_path_factory):
    """A file of text short enough to be tokenised at once."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text[:30_000])
    return path
