"""Perplexities against independent computations on real files."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.errors import InputError
from lrcompress.evaluation.compare import evaluate
from lrcompress.evaluation.tasks import parse_tasks, was_calibrated_on
from lrcompress.recipe import EvaluateSpec
from tests.conftest import compress_tiny


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(text[:8000], encoding="utf8", newline="\n")
    return path


def measured(model, task, **spec):
    return evaluate(str(model), EvaluateSpec(tasks=[task], **spec))["results"]


def test_token_perplexity_equals_a_loop_over_blocks(llama, text_file):
    result = measured(llama, f"tokens:{text_file}@64")["tokens:sample.txt@64"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    ids = tokenizer(text_file.read_text(encoding="utf8"), return_tensors="pt", add_special_tokens=False).input_ids[0]
    losses = []
    for i in range(len(ids) // 64):
        block = ids[i * 64 : i * 64 + 64]
        with torch.no_grad():
            scores = model(block[None]).logits[0].double().log_softmax(-1)
        losses += [-float(scores[t, block[t + 1]]) for t in range(63)]
    assert result["blocks"] == len(ids) // 64
    assert result["tokens"] == len(losses)
    assert result["token_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_limit_takes_the_first_blocks(llama, text_file):
    assert measured(llama, f"tokens:{text_file}@64", limit=3)["tokens:sample.txt@64"]["blocks"] == 3


def test_text_is_lm_evals_rolling_perplexity(llama, text_file):
    result = measured(llama, f"text:{text_file}")["text:sample.txt"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    raw = text_file.read_text(encoding="utf8")
    ids = tokenizer(raw, add_special_tokens=False).input_ids
    window, total = 256, 0.0  # the model's context; a window is preceded by one token: BOS, later the one before it
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        before = tokenizer.bos_token_id if start == 0 else ids[start - 1]
        if len(piece) < window and start:
            context = ids[: start + len(piece)][-window - 1 : -1]
            before = None
        inputs = context if before is None else [before, *piece[:-1]]
        with torch.no_grad():
            scores = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)[-len(piece) :]
        total += sum(float(scores[i, token]) for i, token in enumerate(piece))
    assert result["bits_per_byte"] == pytest.approx(-total / len(raw.encode()) / math.log(2), rel=1e-4)
    assert result["byte_perplexity"] == pytest.approx(2 ** result["bits_per_byte"], rel=1e-6)
    assert result["word_perplexity"] == pytest.approx(math.exp(-total / len(raw.split())), rel=1e-2)


def test_a_folder_of_lm_eval_tasks(llama, tmp_path):
    rows = [{"q": f"{i} is", "choices": [" even", " odd"], "gold": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "parity.yaml").write_text(
        f"task: parity\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            context = tokenizer(row["q"], add_special_tokens=False).input_ids
            whole = tokenizer(row["q"] + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(scores[t - 1, whole[t]]) for t in range(len(context), len(whole))))
        right += sums.index(max(sums)) == row["gold"]
    for given in (tmp_path, tmp_path / "parity.yaml"):
        assert measured(llama, f"tasks:{given}")["parity"]["acc"] == pytest.approx(right / len(rows))


def test_text_that_was_calibrated_on_is_cut_to_its_held_out_end(llama, text_file, tmp_path):
    source = {"source": str(text_file), "samples": 4, "seqlen": 64}
    result = compress_tiny(llama, tmp_path / "out", calibration=source)
    whole = measured(llama, f"tokens:{text_file}@64")["tokens:sample.txt@64"]["blocks"]
    for kwargs in ({}, {"against": str(llama)}):
        found = evaluate(str(result.folder), EvaluateSpec(tasks=[f"tokens:{text_file}@64"], **kwargs))
        assert found["results"]["tokens:sample.txt@64"]["blocks"] == pytest.approx(whole / 10, abs=1)
        if kwargs:
            other = found["against"]["results"]["tokens:sample.txt@64"]
            assert other["tokens"] == found["results"]["tokens:sample.txt@64"]["tokens"]


def test_which_sources_were_calibrated_on(text_file, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    report = {"recipe": {"calibration": [{"source": f"{text_file}*2"}, {"source": f"{tmp_path}/a.jsonl:body"}]}}
    tasks = parse_tasks([f"tokens:{text_file}@8", f"tokens:{tmp_path}/a.jsonl:body@8", "tokens:python-docs@8"])
    assert [was_calibrated_on(t.source, report) for t in tasks] == [True, True, False]
    assert not was_calibrated_on(tasks[0].source, None)


def test_keys_that_collide_are_spelt_out(text_file, tmp_path):
    other = tmp_path / text_file.name
    other.write_text("x")
    keys = [task.key for task in parse_tasks([f"tokens:{text_file}@8", f"tokens:{other}@8", "piqa"])]
    assert keys == [f"tokens:{text_file}@8", f"tokens:{other}@8", "piqa"]


@pytest.mark.parametrize(
    "task", ["tokens:python-docs", "tokens:python-docs@x", "tasks:nowhere", "what is this", "tokens:nope.txt@8"]
)
def test_bad_tasks(task):
    with pytest.raises(InputError):
        parse_tasks([task])


def test_a_model_with_non_finite_logits_is_an_error_not_a_good_score(llama, text_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="non-finite"):
        measured(tmp_path, f"tokens:{text_file}@64")
