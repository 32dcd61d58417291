"""The HTML page: what it says, that it stands alone, that nothing in a report can break out of its text."""

import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.evaluation.generation import NEW_TOKENS, continuations, side_by_side
from lrcompress.report.finished import Finished, read_finished
from lrcompress.report.page import WORST, Samples, heat_maps, make_page
from lrcompress.report.pictures import spectrum_plot
from lrcompress.report.progress import Reporter
from lrcompress.report.spectra import POINTS, Spectrum, dense_spectra, thinned

VOID = {"meta", "br", "wbr", "img", "link", "hr", "input"}
HOSTILE = (
    "</title></style></pre><script>window.hacked = 1</script><img src=x onerror=window.hacked=1>\"'&amp;{{ 7 * 7 }}"
)


class Parsed(HTMLParser):
    """Elements, attributes and text; fails on a tag that is closed out of turn or never."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.css = [], Counter(), [], "", ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *a) for a in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.css += data
        else:
            self.text += data

    def values(self, tag, name):
        return [v for t, n, v in self.attributes if (t, n) == (tag, name)]


def report_of(folder, **changes):
    return Finished(**{**json.loads((folder / "report.json").read_text()), **changes})


@pytest.fixture(scope="module")
def everything(measured, llama):
    """Report and page with every part."""
    report = read_finished("x", measured)
    samples = side_by_side(str(measured), str(llama), report.model, ["The dog", "A"], reporter=Reporter(quiet=True))
    return report, make_page(report, measured, spectra=dense_spectra(str(llama), report.targets), samples=samples)


def test_the_page_says_what_the_report_says(everything, measured, llama):
    report, page = everything
    parsed = Parsed(page)
    evaluation = json.loads((measured / "report.json").read_text())["evaluation"]
    ours = evaluation["results"]["tokens:python-docs@32"]["token_perplexity"]
    dense = evaluation["against"]["results"]["tokens:python-docs@32"]["token_perplexity"]
    for text in (
        f"{report.ratio.stored:.2%}", f"{report.ratio.whole_model:.2%}", "40.00%", "lord", "centred", "uniform", str(llama),
        f"{ours:.4f}", f"{dense:.4f}", f"x{ours / dense:.3f}", "which is not general text",
        f"{report.seconds['decompose']:.1f} s", f"{report.peak_rss_bytes / 1e6:.1f} MB", "ratio: 0.4",
        f"lrcompress run {measured}/recipe.yaml -o {measured.name}-again", "The dog", f"dense ({llama})",
    ):  # fmt: skip
        assert text in parsed.text, text
    assert parsed.text.count(", met\n") == parsed.text.count(", missed\n") == 1
    whole = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    assert report.bytes.checkpoint_dense == pytest.approx(whole, rel=0.05)  # the files have headers


def test_the_page_shows_errors_and_the_paired_test(measured):
    data = json.loads((measured / "report.json").read_text())
    task = "tokens:python-docs@32"
    tests = data["evaluation"]["against"]["tests"][task]
    for p_value, significant, words in (
        (0.03, True, "p = 0.03, significant"),
        (0.2, False, "p = 0.2, not significant"),
    ):
        tests["token_perplexity"] = {"p_value": p_value, "significant": significant, "n": 3}
        page = make_page(Finished(**data), measured)
        text = Parsed(page).text
        assert text.count("paired test") == text.count(words) == 1
        assert "_stderr" not in text
        for side in (data["evaluation"], data["evaluation"]["against"]):
            found = side["results"][task]
            assert f"{found['token_perplexity']:.4f} ±{found['token_perplexity_stderr']:.4f}" in text
        assert f"±{data['evaluation']['results'][task]['kl_stderr']:.4f}" in text


def test_the_page_stands_alone(everything):
    parsed = Parsed(everything[1])
    assert set(parsed.tags).isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    names = {name for _, name, _ in parsed.attributes}
    assert names.isdisjoint({"src", "href", "srcset", "data", "action", "xlink:href"})
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(
        r"url\(|@import|@font-face", parsed.css + "".join(v for _, n, v in parsed.attributes if n == "style")
    )
    assert parsed.tags["svg"] == 2 + 7 + 1  # sizes, a plot per kind of weight, time
    assert all(parsed.values("svg", "aria-label"))
    assert len(parsed.values("svg", "aria-label")) == 10


def test_nothing_in_a_report_becomes_markup(everything, measured):
    def poisoned(value, key=""):
        if isinstance(value, dict):
            return {
                k if key in ("", "targets", "ratio", "bytes") else k + HOSTILE: poisoned(v, k) for k, v in value.items()
            }
        if isinstance(value, list):
            return [poisoned(v, key) for v in value]
        return value.replace("mlp", HOSTILE + ".mlp") if key == "name" else HOSTILE if isinstance(value, str) else value

    data = json.loads((measured / "report.json").read_text())
    evaluation = data.pop("evaluation")
    data = {
        **poisoned(data),
        "calibration": {"sources": [HOSTILE], "tokens": 1, "general": True},
        "warnings": [HOSTILE],
    }
    data["recipe"] = {HOSTILE: HOSTILE, "size": HOSTILE}
    data["ratio"]["of"] = "flops"
    data["exported_from"] = HOSTILE
    data["evaluation"] = {
        "model": HOSTILE,
        "results": {HOSTILE: {HOSTILE: 1.0}},
        "against": {"model": HOSTILE, "results": {HOSTILE: {HOSTILE: 2.0}}},
        "expectations": [{**entry, "expression": HOSTILE} for entry in evaluation["expectations"]],
        "seconds": {HOSTILE: 1.0},
    }
    report = Finished(**data)
    spectra = {t.name: Spectrum([(1, 2.0), (2, 1.0)], (1, 2.0)) for t in report.targets}
    samples = Samples([HOSTILE], [HOSTILE], [HOSTILE], HOSTILE)
    page = make_page(report, Path(HOSTILE.replace("/", "")), spectra=spectra, samples=samples)
    parsed, clean = Parsed(page), Parsed(everything[1])
    assert set(parsed.tags) <= set(clean.tags) | {"code"}
    assert {(t, n) for t, n, _ in parsed.attributes} <= {(t, n) for t, n, _ in clean.attributes}
    assert parsed.text.count(HOSTILE) > 40
    assert "{{ 7 * 7 }}" in parsed.text


def test_a_lone_surrogate_can_be_written(measured, tmp_path):
    from lrcompress.cli.options import write_text

    page = make_page(report_of(measured, model="half \ud83d"), measured)
    write_text(tmp_path / "p.html", "--html", page)
    assert "half ?" in (tmp_path / "p.html").read_text(encoding="utf8")


def test_heat_maps_count_blocks_by_kinds(measured):
    targets = report_of(measured).targets
    removed, error = heat_maps(targets)
    assert [block for block, _ in removed.rows] == ["0", "1", "2"]
    assert len(removed.kinds) == 7
    raw = {t["name"]: t for t in json.loads((measured / "report.json").read_text())["targets"]}
    squares = {
        (block, kind): cell for block, cells in removed.rows for kind, cell in zip(removed.kinds, cells, strict=True)
    }
    errors = {(block, kind): cell for block, cells in error.rows for kind, cell in zip(error.kinds, cells, strict=True)}
    assert squares["0", "mlp.up_proj"] is None  # it was ignored
    for block in "12":
        for kind in removed.kinds:
            entry = raw[f"model.layers.{block}.{kind}"]
            assert squares[block, kind].text == f"{100 - 100 * entry['bytes'] / entry['dense_bytes']:.0f}"
            assert errors[block, kind].text == f"{entry['relative_error']:.2f}"
            assert f"rank {entry['rank']} of {min(entry['shape'])}" in squares[block, kind].title
    strengths = [cell.strength for cell in errors.values() if cell]
    assert max(strengths) == 1.0
    assert min(strengths) >= 0.0
    order = sorted((c for c in errors.values() if c), key=lambda c: c.strength)
    assert [c.text for c in order] == sorted(c.text for c in order)


def test_weights_outside_the_blocks_and_grown_ones_have_squares():
    def target(name, stored, error=None):
        return {"name": name, "format": "low_rank", "shape": (4, 4), "rank": 1, "bytes": stored, "dense_bytes": 100, "relative_error": error}  # fmt: skip

    entries = [
        target("m.layers.0.up", 120),
        target("m.layers.10.up", 40),
        target("m.layers.2.up", 50),
        target("lm_head", 75),
    ]
    report = Finished(
        model="m", method="x", ratio={"asked": None, "stored": 0.1, "whole_model": 0.1}, targets=entries,
        bytes={"targets_dense": 400, "targets_stored": 285, "checkpoint": 285},
    )  # fmt: skip
    (removed,) = heat_maps(report.targets)
    assert [block for block, _ in removed.rows] == ["0", "2", "10", "–"]
    assert [[c and c.text for c in cells] for _, cells in removed.rows] == [
        ["-20", None],
        ["50", None],
        ["60", None],
        [None, "25"],
    ]
    assert removed.rows[0][1][0].strength == 0.0
    Parsed(make_page(report, Path("m")))


def test_what_is_missing_is_said(measured):
    report = report_of(measured)
    bare = report.model_copy(
        update={
            "evaluation": None, "recipe": None, "calibration": None, "metric": "plain", "seconds": {}, "peak_rss_bytes": None,
            "versions": {}, "targets": [t.model_copy(update={"relative_error": None}) for t in report.targets],
        }
    )  # fmt: skip
    text = Parsed(make_page(bare, measured)).text
    for sentence in (
        "Nothing was measured", "has no recipe", "no text was read", "singular values are not in the checkpoint",
        "No errors are recorded", "No times are recorded", "not recorded", "No text was generated", "metric plain reads no",
    ):  # fmt: skip
        assert sentence in text, sentence
        assert (
            sentence not in Parsed(make_page(report, measured)).text
            or "singular" in sentence
            or "text was gen" in sentence
        )
    alone = make_page(report, measured, samples=Samples(["a prompt"], ["a text"]))
    assert "The dense model was not run" in alone
    corrected = make_page(
        report.model_copy(update={"base": "rtn:4:64"}),
        measured,
        spectra={t.name: Spectrum([(1, 1.0)], (1, 1.0)) for t in report.targets},
    )
    assert 'class="cut"' not in corrected
    assert "correction of rtn:4:64" in " ".join(corrected.split())


def test_dense_exports_and_sparse_formats_have_no_cut(measured):
    report = report_of(measured)
    grown = [t.model_copy(update={"bytes": t.dense_bytes + 8, "rank": 0}) for t in report.targets]
    uncut = {t.name: Spectrum([(1, 2.0), (2, 1.0)], None) for t in grown}
    page = make_page(report.model_copy(update={"targets": grown}), measured, spectra=uncut)
    assert "so no cut is marked" in page
    assert "A ring marks" not in page
    removed, *_ = heat_maps(grown)
    assert "strongest" not in removed.note
    assert {cell.strength for _, cells in removed.rows for cell in cells if cell} == {0.0}


def test_the_worst_come_first_and_all_are_there(measured):
    report = report_of(measured)
    many = [
        report.targets[i % 3].model_copy(update={"name": f"m.{i}.w", "relative_error": (i * 37 % 101) / 101})
        for i in range(101)
    ]
    names = re.findall(
        r'<th scope="row">(m\.\d+\.w)</th>', make_page(report.model_copy(update={"targets": many}), measured)
    )
    assert names[:WORST] == [t.name for t in sorted(many, key=lambda t: -t.relative_error)[:WORST]]
    assert names[WORST:] == [t.name for t in many]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_spectra_are_those_of_the_dense_weights(make_model, tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    from tests.conftest import compress_tiny

    dense = make_model(architecture)
    compress_tiny(dense, tmp_path / "out", ratio=0.4)
    report = read_finished("x", tmp_path / "out")
    found = dense_spectra(str(dense), report.targets)
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert set(found) == {t.name for t in report.targets}
    for target in report.targets:
        values = torch.linalg.svdvals(model.get_submodule(target.name).weight.detach().double())
        spectrum = found[target.name]
        assert [n for n, _ in spectrum.points] == list(range(1, len(values) + 1))
        torch.testing.assert_close(torch.tensor([v for _, v in spectrum.points], dtype=torch.float64), values)
        if target.rank < min(target.shape):
            assert spectrum.cut == (target.rank, pytest.approx(float(values[target.rank - 1])))
    assert any(s.cut for s in found.values())


def test_long_spectra_are_thinned_and_whole_or_empty_ranks_cut_nothing():
    values = [1000.0 - i for i in range(1000)]
    thin = thinned(values, 250)
    assert len(thin.points) == POINTS
    assert thin.points[0] == (1, 1000.0)
    assert thin.points[-1] == (1000, 1.0)
    assert all(value == 1001.0 - number for number, value in thin.points)
    assert thin.cut == (250, 751.0)
    assert thinned(values, 0).cut is None
    assert thinned(values, 1000).cut is None


def test_a_plot_is_logarithmic_with_the_cut_on_its_line():
    values = [100.0 * 0.5**i for i in range(20)]
    svg = spectrum_plot([("<a>", thinned(values, 7)), ("flat", thinned([0.0] * 20, 0))], "a & b")
    line, flat = [
        [tuple(map(float, p.split(","))) for p in points.split()] for points in re.findall(r'points="([^"]*)"', svg)
    ]
    steps = [b[1] - a[1] for a, b in itertools.pairwise(line)]
    assert min(steps) > 0
    assert max(steps) - min(steps) < 0.21
    assert len({b[0] - a[0] > 0 for a, b in itertools.pairwise(line)}) == 1
    (cut,) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert tuple(map(float, cut)) == line[6]
    assert len({y for _, y in flat}) == 1
    assert flat[0][1] >= line[-1][1]
    assert svg.count("&lt;a&gt;") == 2  # of the line and of its cut
    assert "<a>" not in svg
    assert "a &amp; b" in svg


def test_another_model_is_refused(measured, make_model):
    targets = read_finished("x", measured).targets
    with pytest.raises(InputError, match="another model"):
        dense_spectra(str(make_model("gpt2")), targets)
    with pytest.raises(InputError, match="q_proj is .* another model"):
        dense_spectra(
            str(make_model("opt")),
            [targets[0].model_copy(update={"name": "model.decoder.layers.0.self_attn.q_proj", "shape": (7, 7)})],
        )
    with pytest.raises(InputError, match="already compressed"):
        dense_spectra(str(measured), targets)


@pytest.mark.parametrize(
    ("culprit", "damage"),
    [
        ("not valid JSON", lambda data: "{"),
        ("no JSON object", lambda data: "[]"),
        ("'ratio' is missing", lambda data: json.dumps({k: v for k, v in data.items() if k != "ratio"})),
        ("targets", lambda data: json.dumps({**data, "targets": []})),
        ("dense_bytes", lambda data: json.dumps({**data, "targets": [{**data["targets"][0], "dense_bytes": 0}]})),
        ("relative_error", lambda data: json.dumps({**data, "targets": [{**data["targets"][0], "relative_error": float("nan")}]})),
        ("seconds", lambda data: json.dumps({**data, "seconds": {"total": "long"}})),
    ],
)  # fmt: skip
def test_a_damaged_report_is_bad_input(checkpoint, culprit, damage):
    path = checkpoint / "report.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(InputError, match=culprit):
        read_finished("x", checkpoint)


def test_continuations_are_the_likeliest_tokens(llama, tokenizer):
    from transformers import AutoModelForCausalLM

    model, prompt = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), "The quick brown fox"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + NEW_TOKENS and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert continuations(str(llama), [prompt]) == [tokenizer.decode(ids[0, start:], skip_special_tokens=True)]
    with pytest.raises(InputError, match="empty"):
        continuations(str(llama), [""])
    with pytest.raises(InputError, match="reads at most 216"):
        continuations(str(llama), ["a b " * 200])


def test_the_dense_side_is_the_recipes_model_where_it_lies_here(measured, llama, tmp_path):
    quiet = Reporter(quiet=True)
    assert side_by_side(str(measured), None, str(llama), ["A"], reporter=quiet).label == str(llama)
    for elsewhere in ("someone/a-model", str(tmp_path / "gone")):
        alone = side_by_side(str(measured), None, elsewhere, ["A"], reporter=quiet)
        assert alone.dense is None
        assert len(alone.compressed) == 1
    assert not quiet.warnings
    assert side_by_side(str(measured), None, str(tmp_path), ["A"], reporter=quiet).dense is None
    assert "left out" in quiet.warnings[0]
    with pytest.raises(InputError):
        side_by_side(str(measured), str(tmp_path), str(llama), ["A"], reporter=quiet)


def test_a_page_of_coded_weights_has_their_bits_and_their_rate_curve(compressed):
    folder = compressed(method="auto", ratio=None, bpw=4.0)
    report = read_finished("x", folder)
    removed, error, bits = heat_maps(report.targets)
    assert [removed.title, error.title, bits.title] == ["Bytes removed", "Relative error", "Bits a weight"]
    raw = {t["name"]: t for t in json.loads((folder / "report.json").read_text())["targets"]}
    for block, cells in bits.rows:
        for kind, cell in zip(bits.kinds, cells, strict=True):
            entry = raw[f"model.layers.{block}.{kind}"]
            assert cell.text == f"{8 * entry['bytes'] / (entry['shape'][0] * entry['shape'][1]):.2f}"
            assert "rank" not in cell.title
    points = dict(report.rates.points)
    assert report.rates.unit == "nats"
    assert all(loss > later for loss, later in itertools.pairwise(points[bits] for bits in sorted(points)))
    parsed = Parsed(make_page(report, folder))
    assert "Predicted loss by bits" in parsed.values("svg", "aria-label")
    assert f"stored: {report.ratio.bpw:.2f} bits" in parsed.text
    without = report.model_copy(update={"rates": None})
    assert "Predicted loss by bits" not in Parsed(make_page(without, folder)).values("svg", "aria-label")


def test_an_answer_of_white_space_is_said_in_words(measured):
    samples = Samples(["a", "b", "c"], ["\n\n \n", "", " word\n"], ["\n", "x", "y"], "dense")
    parsed = Parsed(make_page(report_of(measured), measured, samples=samples))
    for text in ("(nothing but 3 line breaks and 1 spaces)", "(nothing)", " word\n", "(nothing but 1 line breaks"):
        assert text in parsed.text
