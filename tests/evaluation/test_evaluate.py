"""Perplexities against independent computations on real files."""

import itertools
import json
import math
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from lrcompress.calibration.corpus import held_out_documents, split_held_out, tokenise
from lrcompress.calibration.own_text import sample_from_model
from lrcompress.errors import InputError
from lrcompress.evaluation import compare
from lrcompress.evaluation.compare import evaluate
from lrcompress.evaluation.generation import NEW_TOKENS, continuations
from lrcompress.evaluation.tasks import parse_tasks, was_calibrated_on
from lrcompress.evaluation.tokens import score_both
from lrcompress.recipe import EvaluateSpec, make_recipe
from lrcompress.run import check_run
from tests.commands import run_cli
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


def test_texts_are_read_before_the_first_is_measured(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("lrcompress.evaluation.compare.load_model", lambda *args, **rest: pytest.fail("it loaded"))
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(InputError, match=r"short\.txt.* no whole block of 64 tokens"):
        evaluate(str(llama), EvaluateSpec(tasks=[f"tokens:{text_file}@32", f"tokens:{tmp_path}/short.txt@64"]))
    recipe = {"model": str(llama), "method": "lord", "ratio": 0.2, "output": str(tmp_path / "out")}
    (tmp_path / "longer.txt").write_text("a few words " * 40)  # whose last tenth is not
    judged = {"source": f"{tmp_path}/longer.txt", "samples": 1, "seqlen": 64}
    for name, calibration in (("short", {}), ("longer", {"calibration": judged})):
        tasks = {"tasks": [f"tokens:{tmp_path}/{name}.txt@64"]}
        with pytest.raises(InputError, match="no whole block"):
            check_run(make_recipe({**recipe, **calibration, "evaluate": tasks}))
    check_run(make_recipe({**recipe, "evaluate": tasks}))


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
    rows = [{"q": f"{i} is", "choices": ["even", "odd"], "gold": i % 2} for i in range(8)]
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
            # lm-eval puts a blank between.
            whole = tokenizer(f"{row['q']} {choice}", add_special_tokens=False).input_ids
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


@pytest.mark.parametrize("reader", ["calibration", "training"])
def test_no_character_that_was_read_is_evaluated(llama, tmp_path, monkeypatch, text, reader):
    """Digits are a token each, words are not: a tenth of the tokens is far from a tenth of the characters."""
    path = tmp_path / "a.txt"
    path.write_text(text[:14000] + " é" + "0123456789 " * 270, encoding="utf8", newline="\n")
    out = compress_tiny(llama, tmp_path / "out", calibration={"source": str(path), "samples": 4, "seqlen": 64}).folder
    tokenizer = AutoTokenizer.from_pretrained(llama)
    read, _ = split_held_out(tokenise([path.read_text(encoding="utf8")], tokenizer))
    if reader == "training":
        report = json.loads((out / "report.json").read_text())
        report["recipe"]["calibration"][0]["source"] = "c4"
        (out / "report.json").write_text(json.dumps({**report, "trained_on": [f"{path}*2"]}))
    seen, real = [], compare.run_lm_eval

    def run_lm_eval(loaded, task, spec, *, texts, warn):
        seen.append(texts)
        return real(loaded, task, spec, texts=texts, warn=warn)

    monkeypatch.setattr(compare, "run_lm_eval", run_lm_eval)
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    evaluate(str(out), EvaluateSpec(tasks=[f"text:{path}"], against=str(llama)))
    held = path.read_text(encoding="utf8")[len(tokenizer.decode(read)) :]
    assert seen == [[held], [held]]
    assert set(held) <= set("0123456789 ")


def test_held_out_documents_of_a_tokenizer_that_says_no_places():
    found = held_out_documents(["abcdefgh", "ijklmnopqr"], ByT5Tokenizer())
    assert found == ["qr"]


@pytest.mark.parametrize(("lengths", "kept"), [((3000, 100, 900), 1), ((3000, 500, 20), 2), ((9, 9), 1)])
def test_held_out_documents_leave_out_whole_ones_and_cut_one(tokenizer, text, lengths, kept):
    ends = list(itertools.accumulate(lengths, initial=0))
    texts = [text[a:b] for a, b in itertools.pairwise(ends)]
    read, held = split_held_out(tokenise(texts, tokenizer))
    found = held_out_documents(texts, tokenizer)
    assert len(found) == kept
    assert tokenizer.decode(read) + "\n\n".join(found) == "\n\n".join(texts)
    assert tokenizer.decode(held) == "\n\n".join(found)


def test_other_splits_are_evaluated_whole():
    report = {"recipe": {"calibration": [{"source": s} for s in ("wikitext2", "c4*2", "self", "python-docs")]}}
    tasks = parse_tasks([f"tokens:{name}@8" for name in ("wikitext2", "c4", "self", "python-docs")])
    assert [was_calibrated_on(task.source, report) for task in tasks] == [False, False, False, True]


def test_which_sources_were_calibrated_on(text_file, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    report = {"recipe": {"calibration": [{"source": f"{text_file}*2"}, {"source": f"{tmp_path}/a.jsonl:body"}]}}
    tasks = parse_tasks([f"tokens:{text_file}@8", f"tokens:{tmp_path}/a.jsonl:body@8", "tokens:python-docs@8"])
    assert [was_calibrated_on(t.source, report) for t in tasks] == [True, True, False]
    assert not was_calibrated_on(tasks[0].source, None)
    report = {"recipe": {"calibration": []}, "trained_on": [f"{tmp_path}/a.jsonl:question,body"]}
    assert [was_calibrated_on(t.source, report) for t in tasks] == [False, True, False]


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


@pytest.fixture
def smaller(compressed):
    """The tiny Llama, compressed."""
    return compressed(ratio=0.3)


def test_divergence_equals_a_sum_over_the_vocabulary(llama, smaller, text_file):
    found = evaluate(str(smaller), EvaluateSpec(tasks=[f"tokens:{text_file}@160"], against=str(llama), limit=4))
    key = "tokens:sample.txt@160"
    dense, small = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (llama, smaller))
    ids = AutoTokenizer.from_pretrained(llama)(text_file.read_text(encoding="utf8"), add_special_tokens=False).input_ids
    kl, same = [], []
    for i in range(4):
        block = torch.tensor([ids[i * 160 : i * 160 + 160]])
        with torch.no_grad():
            p, q = (model(block).logits[0, :-1].double().softmax(-1) for model in (dense, small))
        kl += [float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)]
        same += [int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True)]
    assert len(kl) == found["results"][key]["tokens"] == 4 * 159
    assert found["results"][key]["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    for name, share in (("kl_median", 0.5), ("kl_p90", 0.9)):
        limit = found["results"][key][name]
        assert sum(value <= limit * (1 + 1e-4) for value in kl) >= share * len(kl)
        assert sum(value >= limit * (1 - 1e-4) for value in kl) > (1 - share) * len(kl)
    assert 0 <= found["results"][key]["kl_floor"] < 1e-9  # float32
    assert found["results"][key]["top1"] == pytest.approx(sum(same) / len(same))
    assert 0 < found["results"][key]["top1"] < 1
    for name, values in (("kl", kl), ("top1", same)):
        means = [statistics.fmean(values[i * 159 : i * 159 + 159]) for i in range(4)]
        assert found["results"][key][f"{name}_stderr"] == pytest.approx(statistics.stdev(means) / 2, rel=1e-5)
    # Both models' losses are those that each has alone.
    for folder, results in ((smaller, found["results"]), (llama, found["against"]["results"])):
        alone = measured(folder, f"tokens:{text_file}@160", limit=4)[key]
        assert results[key]["token_perplexity"] == pytest.approx(alone["token_perplexity"], rel=1e-9)
    assert "kl" not in found["against"]["results"][key]


def test_a_model_does_not_diverge_from_itself_and_expectations_know_it(llama, text_file):
    spec = EvaluateSpec(tasks=[f"tokens:{text_file}@64"], against=str(llama), limit=2)
    found = evaluate(str(llama), spec, ["kl <= 1e-9", "top1 >= 100%", "top1 < 1"])
    assert [entry["met"] for entry in found["expectations"]] == [True, True, False]
    assert found["expectations"][0]["value"] == pytest.approx(0, abs=1e-12)


def test_models_with_other_tokens_are_measured_apart(llama, text_file, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = evaluate(str(llama), EvaluateSpec(tasks=[f"tokens:{text_file}@64"], against=str(tmp_path), limit=2))
    assert all("kl" not in side["results"]["tokens:sample.txt@64"] for side in (found, found["against"]))
    with pytest.raises(InputError, match="kl was not measured"):
        evaluate(str(llama), EvaluateSpec(tasks=[f"tokens:{text_file}@64"], limit=2), ["kl < 1"])


def test_results_keep_the_order_of_the_tasks(llama, smaller, text_file):
    tasks = [f"text:{text_file}", f"tokens:{text_file}@64", "tokens:python-docs@64"]
    found = evaluate(str(smaller), EvaluateSpec(tasks=tasks, against=str(llama), limit=2))
    names = ["text:sample.txt", "tokens:sample.txt@64", "tokens:python-docs@64"]
    assert list(found["results"]) == list(found["against"]["results"]) == names


def test_the_error_of_a_perplexity_is_that_of_the_blocks_means(llama, text_file):
    found = measured(llama, f"tokens:{text_file}@64", limit=5)["tokens:sample.txt@64"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    ids = torch.tensor(tokenizer(text_file.read_text(encoding="utf8"), add_special_tokens=False).input_ids[:320])
    with torch.no_grad():
        means = [float(model(block[None], labels=block[None]).loss) for block in ids.view(5, 64)]
    error = statistics.stdev(means) / math.sqrt(5) * math.exp(statistics.fmean(means))
    assert found["token_perplexity_stderr"] == pytest.approx(error, rel=1e-4)
    assert "token_perplexity_stderr" not in measured(llama, f"tokens:{text_file}@64", limit=1)["tokens:sample.txt@64"]


def test_no_weights_are_unpickled(llama, tokenizer, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(InputError, match="safetensors"):
        continuations(str(tmp_path), ["The"])
    with pytest.raises(InputError, match="safetensors"):
        measured(tmp_path, "tokens:python-docs@64", limit=1)
    with pytest.raises(InputError, match="safetensors"):
        sample_from_model(tmp_path, tokenizer, 1, 8, 0)


def test_quiet_is_quiet(llama, text_file, tmp_path):
    """Outside a repository, where git complains; the libraries' bars go to stderr as well."""
    done = run_cli("eval", llama, "--tasks", f"text:{text_file}", "--limit", 1, "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_a_model_writes_is_the_likeliest_whatever_its_generation_config_says(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "steered")
    steering = {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(8, 200)), "min_p": 0.9, "num_beams": 3,
                "exponential_decay_length_penalty": [2, 3.0], "max_new_tokens": 3, "eos_token_id": [1, 2]}  # fmt: skip
    (tmp_path / "steered/generation_config.json").write_text(json.dumps(steering))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    prompts = ["The capital", "Once upon", "if"]
    for prompt, found in zip(prompts, continuations(str(tmp_path / "steered"), prompts), strict=True):
        ids = tokenizer(prompt).input_ids
        start = len(ids)
        while len(ids) - start < NEW_TOKENS and ids[-1] not in (1, 2):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found == tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture
def larger_tokenizer(llama, tmp_path):
    """The tiny Llama beside a tokenizer that has two more tokens than it."""
    folder = shutil.copytree(llama, tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["lambda", "assert"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tokens", "text", "tasks"])
def test_a_token_that_the_model_does_not_know_is_bad_input(larger_tokenizer, tmp_path, kind):
    (tmp_path / "t.txt").write_text("assert lambda x: x, 'and so on and on and on' " * 20)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/q.jsonl").write_text(json.dumps({"q": "assert lambda?"}) + "\n")
    (tmp_path / "tasks/mine.yaml").write_text(json.dumps({
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/tasks/q.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": 0,
        "doc_to_choice": ["yes", "no"], "metric_list": [{"metric": "acc"}],
    }))  # fmt: skip
    task = {
        "tokens": f"tokens:{tmp_path}/t.txt@16",
        "text": f"text:{tmp_path}/t.txt",
        "tasks": f"tasks:{tmp_path}/tasks",
    }[kind]
    with pytest.raises(InputError, match=r"added makes token 32\d, the model knows 320"):
        measured(larger_tokenizer, task)


def test_a_prompt_with_a_token_that_the_model_does_not_know_is_bad_input(larger_tokenizer):
    with pytest.raises(InputError, match=r"makes token 32\d, the model knows 320"):
        continuations(str(larger_tokenizer), ["assert"])


class Rounded(torch.nn.Module):
    """Token 0 is likelier by 0.1 nats a token that is read, as if it were rounding that depends on the length."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(5))

    def forward(self, input_ids, use_cache):
        logits = self.bias.repeat(1, input_ids.shape[1], 1)
        logits[..., 0] = 0.1 * input_ids.shape[1]
        return SimpleNamespace(logits=logits)


def test_the_floor_is_the_divergence_of_the_reference_from_itself():
    blocks = torch.zeros(3, 8, dtype=torch.long)
    _, _, apart = score_both(Rounded(), Rounded(), blocks, lambda: None)
    p, q = (torch.tensor([0.1 * length, 0, 0, 0, 0], dtype=torch.float64).softmax(0) for length in (8, 4))
    assert apart.metrics()["kl_floor"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    assert apart.metrics()["kl"] == 0
