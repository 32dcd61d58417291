"""Compression from end to end on tiny models: bytes, statistics, resume, refusals."""

import json
import math
import statistics
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.calibration.collect import InputCollector, token_weights
from lrcompress.calibration.corpus import parse_source
from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.cli.show import in_one_line
from lrcompress.errors import InputError, Interrupted
from lrcompress.export.source import open_compressed
from lrcompress.methods.spectral import SpectralMethod
from lrcompress.pipeline import make_plan
from lrcompress.protocols import InputStatistics
from lrcompress.recipe import make_recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages import opening
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import HiddenWalk
from lrcompress.stages.request import check_request
from tests.conftest import ARCHITECTURES, compress_tiny


def recipe(model, **changes):
    data = {"model": str(model), "method": "lord", "ratio": 0.3,
            "calibration": {"source": "python-docs", "samples": 4, "seqlen": 64}, **changes}  # fmt: skip
    return make_recipe(data)


def header_bytes(folder, prefix):
    """Bytes of the tensors under a prefix, from the raw safetensors header."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            head = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in head.items():
            if name.startswith(prefix):
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lord", "welore"])
@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_stored_ratio_is_counted_from_the_files(make_model, tmp_path, architecture, method, ratio):
    result = compress_tiny(make_model(architecture), tmp_path / "out", method=method, ratio=ratio)
    report = result.report
    stored = 0
    for target in report["targets"]:
        in_file = header_bytes(result.folder, target["name"] + ".")
        original_bias = 4 * target["shape"][0] if architecture in ("gpt2", "opt", "gpt_neox") else 0
        assert target["bytes"] == in_file - original_bias
        stored += target["bytes"]
    dense = report["bytes"]["targets_dense"]
    assert report["ratio"]["stored"] == pytest.approx(1 - stored / dense)
    assert ratio <= report["ratio"]["stored"] <= ratio + 0.02  # a rank of a tiny weight is a large step
    assert report["bytes"]["checkpoint"] == CheckpointReader(result.folder).bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_walking_block_by_block_equals_running_the_model(make_model, tmp_path, architecture):
    """Statistics and final hidden states of the streamed walk against hooks on the whole model in memory."""
    request = check_request(recipe(make_model(architecture)))
    opened = open_request(request, Reporter(quiet=True))
    walk = HiddenWalk(opened, tmp_path / "hidden")
    assert walk.start(0) == 0
    streamed = {}
    for block in range(len(opened.blocks)):
        with opened.walker.block(block) as module:
            streamed |= walk.step(block, module, opened.sites_of(block), lambda: None)
    model = AutoModelForCausalLM.from_pretrained(make_model(architecture), dtype=torch.float32).eval()
    ids = opened.calibration.ids
    weights = token_weights(ids.shape[1], 0.125)
    with torch.no_grad(), InputCollector(model, opened.sites, weights) as collector:
        whole = [model(input_ids=row[None], use_cache=False).logits for row in ids]
    assert streamed.keys() == collector.statistics.keys()
    for name, found in collector.statistics.items():
        torch.testing.assert_close(streamed[name].second, found.second, rtol=1e-4, atol=1e-4)
        assert streamed[name].count == found.count
    last = walk.calibration(len(opened.blocks))
    with torch.no_grad():
        for i, expected in enumerate(whole):
            torch.testing.assert_close(opened.walker.logits(ids[i], last.read(i)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "shared"),
    [("llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]), ("gpt2", []),
     ("opt", [{"q_proj", "k_proj", "v_proj"}])],
)  # fmt: skip
def test_groups_are_found_from_shared_inputs(make_model, architecture, shared):
    opened = open_request(check_request(recipe(make_model(architecture))), Reporter(quiet=True))
    groups = {}
    for site in opened.sites_of(1):
        groups.setdefault(site.group, set()).add(site.name.rpartition(".")[2])
    assert [g for g in groups.values() if len(g) > 1] == shared


def test_statistics_merge_exactly():
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    whole, first, second = (InputStatistics.zeros(5) for _ in range(3))
    whole.update(rows)
    first.update(rows[:20])
    second.update(rows[20:])
    first.merge(second)
    torch.testing.assert_close(first.gram(centred=True), torch.cov(rows.T.double(), correction=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first.second, whole.second, rtol=1e-6, atol=1e-6)


def test_weighted_rows_equal_repeated_rows():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weighted, repeated = InputStatistics.zeros(4), InputStatistics.zeros(4)
    weighted.update(rows, torch.tensor([3.0, 1, 1, 1, 1, 1]))
    repeated.update(torch.cat([rows[:1], rows[:1], rows]))
    assert weighted.count == repeated.count == 8
    torch.testing.assert_close(weighted.second, repeated.second)
    torch.testing.assert_close(weighted.total, repeated.total)


def test_the_first_token_gets_the_asked_share():
    weights = token_weights(1024, 0.125)
    assert float(weights[0] / weights.sum()) == pytest.approx(0.125)
    assert weights[1:].unique().tolist() == [1.0]
    assert token_weights(1024, 0.0) is None


def test_the_plan_is_what_is_written(llama, tmp_path):
    for method in ("lord", "welore"):
        plan = make_plan(recipe(llama, method=method))
        result = compress_tiny(llama, tmp_path / method, method=method, ratio=0.3)
        keys = ("name", "format", "rank", "bytes")
        assert [[t[k] for k in keys] for t in plan["targets"]] == [
            [t[k] for k in keys] for t in result.report["targets"]
        ]


def test_plain_welore_reads_no_text(llama, tmp_path):
    method = {"name": "welore", "metric": "plain"}
    result = compress_tiny(llama, tmp_path / "out", method=method)
    other = compress_tiny(llama, tmp_path / "other", method=method, seed=3)
    assert result.report["calibration"] is None
    first, second = ((r.folder / "model.safetensors").read_bytes() for r in (result, other))
    assert first == second


def test_plain_welore_is_judged_on_held_out_text(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("lrcompress.stages.held_out.LOUD_LOSS", 0.5)
    result = compress_tiny(llama, tmp_path / "out", method={"name": "welore", "metric": "plain"})
    assert any("a metric that reads text" in warning for warning in result.report["warnings"])


def test_target_and_ignore(llama, tmp_path):
    result = compress_tiny(llama, tmp_path / "out", target=["*.mlp.*"], ignore=["re:layers\\.1\\."])
    names = [t["name"] for t in result.report["targets"]]
    assert len(names) == 6
    assert all(".mlp." in n and ".1." not in n for n in names)


def test_the_output_head_when_named(llama, tmp_path):
    result = compress_tiny(llama, tmp_path / "out", target=["lm_head", "*.mlp.up_proj"])
    head = next(t for t in result.report["targets"] if t["name"] == "lm_head")
    assert head["format"] == "pivoted"
    assert head["relative_error"] > 0
    AutoModelForCausalLM.from_pretrained(result.folder)


def test_a_tied_head_is_refused(make_model, tmp_path):
    with pytest.raises(InputError, match="shares its weight with"):
        compress_tiny(make_model("qwen3"), tmp_path / "out", target=["lm_head"])


def test_a_compressed_checkpoint_is_refused_as_input_of_methods_that_need_the_dense_one(llama, tmp_path):
    first = compress_tiny(llama, tmp_path / "first")
    with pytest.raises(InputError, match="compressed already"):
        compress_tiny(first.folder, tmp_path / "second", method="cospadi")
    assert not (tmp_path / "second").exists()
    assert not (tmp_path / "second.partial").exists()


def test_a_useless_result_is_announced(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("lrcompress.stages.held_out.LOUD_LOSS", 0.5)
    result = compress_tiny(llama, tmp_path / "out")
    (warning,) = [text for text in result.report["warnings"] if "held-out" in text]
    held_out = result.report["held_out"]
    assert f"{held_out['perplexity'] / held_out['before']:.3g} times that of the dense model" in warning
    for way in ("leave --method out", f"more than these {result.report['ratio']['bpw']:.2f} bits", "lrcompress heal"):
        assert way in warning
    card = (result.folder / "README.md").read_text()
    assert f"{held_out['perplexity'] / held_out['before']:.3f} times, 1 window" in card
    assert f"**Warning**: {warning}" in card


@pytest.mark.parametrize("samples", [2, 40])
def test_what_is_known_of_the_text_is_said_once_and_before_the_work(llama, tmp_path, monkeypatch, samples):
    said = []
    monkeypatch.setattr(Reporter, "say", lambda self, line: said.append(line))
    monkeypatch.setattr(Reporter, "warn", lambda self, line: said.append(line))

    def began(*args):
        said.append("the work")
        raise KeyboardInterrupt

    monkeypatch.setattr("lrcompress.pipeline.profile_model", began)
    with pytest.raises(Interrupted):
        compress_tiny(llama, tmp_path / "out", calibration={"source": "python-docs", "samples": samples, "seqlen": 64})
    assert said[-1] == "the work"
    assert sum("not general text" in line for line in said) == 1
    widest = max(p.shape[1] for n, p in AutoModelForCausalLM.from_pretrained(llama).named_parameters() if "_proj" in n)
    assert 2 * 64 < 4 * widest < 40 * 64
    few = [line for line in said if "calibration tokens are few" in line]
    needed = math.ceil(4 * widest / 64)
    assert (few == []) == (samples >= needed)
    assert all(f"{64 * samples} calibration tokens" in line and f"--samples {needed}" in line for line in few)


def test_no_text_is_waited_for_where_another_is_too_short(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lrcompress.calibration.drawing.sample_from_model", lambda *args, **rest: pytest.fail("it wrote")
    )
    (tmp_path / "short.txt").write_text("a few words")
    sources = [{"source": name, "samples": 2, "seqlen": 64} for name in ("self", str(tmp_path / "short.txt"))]
    with pytest.raises(InputError, match=r"short\.txt is too short"):
        compress_tiny(llama, tmp_path / "out", calibration=sources)


def test_the_held_out_perplexity_is_that_of_the_written_model(llama, tmp_path):
    result = compress_tiny(llama, tmp_path / "out")
    held_out, spec = result.report["held_out"], result.report["recipe"]["calibration"][0]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sources = [(parse_source(spec["source"]), spec["samples"], spec["seqlen"])]
    ids = calibration_blocks(sources, tokenizer, 0, llama).held_out
    assert len(ids) == held_out["windows"]
    assert [context["tokens"] for context in held_out["contexts"]] == [64, 16]
    for folder, key in ((result.folder, "perplexity"), (llama, "before")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for context, expected in (
            (64, held_out[key]),
            (64, held_out["contexts"][0][key]),
            (16, held_out["contexts"][1][key]),
        ):
            part = ids[:, :context]
            with torch.no_grad():
                loss = model(input_ids=part, labels=part).loss
            assert float(loss.exp()) == pytest.approx(expected, rel=1e-3)
    card = (result.folder / "README.md").read_text()
    assert "64 tokens of context" in card
    assert "16 tokens of context" in card


def test_a_held_out_ratio_has_the_error_of_its_windows(llama, tmp_path):
    calibration = {"source": "python-docs", "samples": 24, "seqlen": 64}
    result = compress_tiny(llama, tmp_path / "out", calibration=calibration)
    held_out, tokenizer = result.report["held_out"], AutoTokenizer.from_pretrained(llama)
    windows = calibration_blocks([(parse_source("python-docs"), 24, 64)], tokenizer, 0, llama).held_out
    assert len(windows) == held_out["windows"] == 3
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (llama, result.folder)]
    with torch.no_grad():
        before, after = ([float(m(input_ids=w[None], labels=w[None]).loss) for w in windows] for m in models)
    rises = [b - a for a, b in zip(before, after, strict=True)]
    ratio = held_out["perplexity"] / held_out["before"]
    error = ratio * statistics.stdev(rises) / math.sqrt(3)
    assert held_out["ratio_stderr"] == pytest.approx(error, rel=0.02)
    said = f"{ratio:.3f} ± {held_out['ratio_stderr']:.3f}"
    assert f"perplexity × {said} on 3 windows of held-out" in in_one_line(result.report, result.folder)
    assert f"{said} times, 3 windows" in (result.folder / "README.md").read_text()


def test_another_seed_reads_other_text(llama, tmp_path):
    digests = {compress_tiny(llama, tmp_path / str(s), seed=s).report["calibration"]["sha256"] for s in (0, 1)}
    assert len(digests) == 2


def test_same_recipe_same_bytes(llama, tmp_path):
    folders = [compress_tiny(llama, tmp_path / name).folder for name in ("a", "b")]
    first, second = ((f / "model.safetensors").read_bytes() for f in folders)
    assert first == second


def test_dtype_to_write(llama, tmp_path):
    result = compress_tiny(llama, tmp_path / "out", dtype="bfloat16")
    reader = CheckpointReader(result.folder)
    assert {reader.meta(n).dtype for n in reader.names()} <= {torch.bfloat16, torch.int16}
    assert json.loads((result.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_blocks_begin_with_bos_where_the_tokenizer_adds_one(llama, tmp_path):
    from lrcompress.calibration.corpus import Source

    plain = AutoTokenizer.from_pretrained(llama)
    from tokenizers.processors import TemplateProcessing

    adding = AutoTokenizer.from_pretrained(llama)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert adding("a").input_ids[0] == 0
    with_bos = calibration_blocks([(Source("python-docs"), 3, 32)], adding, 0, llama)
    without = calibration_blocks([(Source("python-docs"), 3, 32)], plain, 0, llama)
    assert (with_bos.ids[:, 0] == 0).all()
    assert not (without.ids == 0).any()
    assert (with_bos.held_out[:, 0] == 0).all()


@pytest.mark.parametrize(("architecture", "wide"), [("llama", "down_proj"), ("gpt2", "c_proj")])
@pytest.mark.parametrize("method", ["lord", "welore"])
def test_outputs_of_wide_weights_give_what_their_inputs_do(
    make_model, tmp_path, monkeypatch, architecture, wide, method
):
    model = make_model(architecture)
    opened = open_request(check_request(recipe(model, method=method)), Reporter(quiet=True))
    marked = [site for site in opened.sites if site.by_outputs]
    assert {site.name.rpartition(".")[2] for site in marked} == {wide}
    assert all(site.shape[0] < site.shape[1] for site in marked)
    outputs = compress_tiny(model, tmp_path / "outputs", method=method)
    monkeypatch.setattr(SpectralMethod, "outputs_suffice", lambda self, site: False)
    inputs = compress_tiny(model, tmp_path / "inputs", method=method)
    ours, theirs = (open_compressed(str(result.folder)) for result in (outputs, inputs))
    for site in marked:
        one, other = (source.layer(site.name).dense() for source in (ours, theirs))
        assert float((one - other).norm() / other.norm()) < 1e-3
    for one, other in zip(outputs.report["targets"], inputs.report["targets"], strict=True):
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-3)


def test_in_half_precision_statistics_are_of_inputs(llama, monkeypatch):
    monkeypatch.setattr(opening, "compute_dtype", lambda device, checkpoint: torch.bfloat16)
    opened = open_request(check_request(recipe(llama)), Reporter(quiet=True))
    assert not any(site.by_outputs for site in opened.sites)
