"""The page in a real headless Chromium: on a phone, on a desk, on paper, light and dark.

Skipped where no Python has PyQt6-WebEngine (dependency group `browser`); BROWSER_PYTHON names one apart from ours.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lrcompress.report.finished import read_finished
from lrcompress.report.page import Samples, make_page
from lrcompress.report.spectra import dense_spectra

PYTHON = os.environ.get("BROWSER_PYTHON", sys.executable)
HAVE = (
    subprocess.run([PYTHON, "-c", "import PyQt6.QtWebEngineWidgets"], capture_output=True, check=False).returncode == 0
)
pytestmark = pytest.mark.skipif(not HAVE, reason="no PyQt6-WebEngine: pip install PyQt6-WebEngine")


def browse(page, *arguments):
    """What the browser saw."""
    command = [PYTHON, Path(__file__).with_name("browser.py"), page, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def page(measured, llama, tmp_path_factory):
    """A page of many blocks and long names, whose texts try to break out."""
    report = read_finished("x", measured)
    spectra = dense_spectra(str(llama), report.targets)
    hostile = "<script>window.hacked = 1</script>" + "w" * 300
    targets = []
    for block in range(40):
        for target in report.targets:
            kind = target.name.split(".", 3)[3]
            name = f"model.layers.{block}.{kind}"
            targets.append(target.model_copy(update={"name": name}))
            spectra[name] = spectra[target.name]
    assert report.evaluation
    against = report.evaluation.against.model_copy(update={"model": "/a/very/long/path" * 20})
    report = report.model_copy(
        update={
            "model": "a" * 200, "warnings": [hostile], "targets": targets,
            "evaluation": report.evaluation.model_copy(update={"against": against}),
        }
    )  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "page.html"
    samples = Samples(["a prompt"], [hostile], [hostile], "dense")
    path.write_text(make_page(report, measured, spectra=spectra, samples=samples), encoding="utf8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_the_page_fits_and_reads(page, width, scheme):
    seen = browse(page, width, scheme)
    assert seen["width"] == width
    assert seen["content"] <= width
    assert seen["outside"] == []
    assert seen["scrolled"] > 0  # the long path in the table scrolls in its own box
    assert all(0 < w <= width and h > 10 for w, h in seen["svgs"])
    assert len(seen["svgs"]) == 2 + 7 + 1
    for text in (
        "What was removed where",
        "token_perplexity",
        "missed",
        "ratio: 0.4",
        "a prompt",
        "<script>window.hacked",
    ):
        assert text in seen["text"]
    assert seen["hacked"] == "undefined"
    assert (seen["scripts"], seen["console"]) == (0, [])
    assert seen["requests"] == [page.as_uri()]  # nothing else is asked for
    assert seen["dark"] is (scheme == "dark")
    paper, ink = (sum(map(int, re.findall(r"\d+", seen[key])[:3])) for key in ("paper", "ink"))
    assert (paper < 150 < 600 < ink) if scheme == "dark" else (ink < 150 < 600 < paper)


def test_the_page_prints(page, tmp_path):
    browse(page, "print", tmp_path / "paper.pdf")
    data = (tmp_path / "paper.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) < 40
