"""lrcompress report through real processes."""

import json
import os

import pytest

from lrcompress.cli.options import write_text
from lrcompress.errors import ResourceError
from tests.commands import run_cli


def test_report_writes_one_page(measured, llama, tmp_path):
    done = run_cli("report", measured, "--html", "p.html", "--against", llama, "--prompt", "Hello <b>", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote p.html\n"
    assert os.listdir(tmp_path) == ["p.html"]
    page = (tmp_path / "p.html").read_text()
    assert "Hello &lt;b&gt;" in page
    assert page.count('class="text"') == 2
    assert page.count("<svg") == 10
    (tmp_path / "prompts.txt").write_text("One\n\n  \nTwo\n")
    done = run_cli("report", measured, "--html", "p.html", "--prompts", "prompts.txt", "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "p.html").read_text().count('class="text"') == 4  # the recipe's own model lies here
    done = run_cli("report", measured, "--html", "p.html", "--no-generate", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No text was generated" in (tmp_path / "p.html").read_text()


def test_a_checkpoint_alone_says_what_it_is_worth(measured, tmp_path):
    done = run_cli(measured, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((measured / "report.json").read_text())
    held_out, evaluation = report["held_out"], report["evaluation"]
    task = "tokens:python-docs@32"
    sides = (evaluation["results"][task], evaluation["against"]["results"][task])
    own, other = (side["token_perplexity"] for side in sides)
    lines = done.stdout.splitlines()
    assert lines[1:3] == [
        f"perplexity × {held_out['perplexity'] / held_out['before']:.2f} on 1 window of held-out calibration text",
        f"perplexity × {own / other:.3f} on {task} ({sides[0]['blocks']} blocks)",
    ]


def test_without_a_page_a_short_report_is_printed(measured, tmp_path):
    done = run_cli("report", measured, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((measured / "report.json").read_text())
    found, *_ = report["evaluation"]["results"].values()
    assert f"checkpoint {report['bytes']['checkpoint'] / 1e6:.1f} MB" in done.stdout
    assert f"{found['token_perplexity']:.4f}" in done.stdout
    assert f"({found['blocks']}" in done.stdout
    assert "wrote" not in done.stdout
    assert done.stdout.splitlines()[-1] == f"a page about it: lrcompress report {measured} --html FILE.html"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("culprit", "arguments"),
    [
        ("no report.json", ["DENSE", "--html", "p.html"]),
        ("is no folder", ["nowhere/at-all", "--html", "p.html"]),
        ("--html FILE", ["DONE", "--prompt", "x"]),
        ("no such folder", ["DONE", "--html", "none/p.html"]),
        ("it is a folder", ["DONE", "--html", "."]),
        ("--no-generate", ["DONE", "--html", "p.html", "--no-generate", "--prompt", "x"]),
        ("gone.txt", ["DONE", "--html", "p.html", "--prompts", "gone.txt"]),
        ("no prompt", ["DONE", "--html", "p.html", "--prompts", "blank.txt"]),
        ("not UTF-8", ["DONE", "--html", "p.html", "--prompts", "binary.txt"]),
        ("empty", ["DONE", "--html", "p.html", "--prompt", ""]),
        ("already compressed", ["DONE", "--html", "p.html", "--against", "DONE"]),
        ("does not exist", ["DONE", "--html", "p.html", "--against", "./gone"]),
        ("warp", ["DONE", "--html", "p.html", "--device", "warp"]),
    ],
)
def test_bad_usage_leaves_the_old_page(measured, llama, tmp_path, culprit, arguments):
    (tmp_path / "p.html").write_text("old")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    before = sorted(os.listdir(tmp_path))
    named = {"DENSE": str(llama), "DONE": str(measured)}
    done = run_cli("report", *[named.get(a, a) for a in arguments], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert culprit in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "p.html").read_text() == "old"


def test_what_an_option_asked_for_is_written_whole(tmp_path, monkeypatch):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "--html", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"

    def full(self, *args, **kwargs):
        open(self, "w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(ResourceError, match="is full"):
        write_text(tmp_path / "real.txt", "--html", "newer")
    monkeypatch.undo()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link.txt", "real.txt"]
    reading, writing = os.pipe()
    write_text(type(tmp_path)(f"/dev/fd/{writing}"), "--html", "through")
    assert os.read(reading, 100) == b"through"
