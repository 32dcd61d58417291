"""What the tests of training share."""

import pytest


@pytest.fixture(scope="session")
def corpus(prose, once):
    """A file of text short enough to be tokenised at once."""

    def write(folder):
        folder.mkdir()
        (folder / "text.txt").write_text(prose[:30_000])

    return once("text", write) / "text.txt"
