"""Sources of text and how they become blocks."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrcompress.calibration import corpus, own_text
from lrcompress.calibration.corpus import Source, documents, parse_source, shares
from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.errors import InputError
from lrcompress.evaluation.zero_shot import read_documents
from lrcompress.training.rows import _read_pairs


def test_parsing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    assert parse_source("python-docs") == Source("python-docs")
    assert parse_source("c4*3") == Source("c4", weight=3.0)
    assert parse_source(f"{path}:body*0.5") == Source(str(path), "body", 0.5)
    starred = tmp_path / "a*b.txt"
    starred.write_text("x")
    assert parse_source(str(starred)) == Source(str(starred))
    with pytest.raises(InputError, match=r"nope\.txt does not exist"):
        parse_source("nope.txt")
    for weight in ("0", "-1", "inf", "nan"):
        with pytest.raises(InputError, match="above zero"):
            parse_source(f"c4*{weight}")


def test_files_of_every_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_bytes("é\r\n\nx".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "n": 1}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["p", "q"]}), tmp_path / "a.parquet")
    assert documents(parse_source(str(tmp_path / "a.txt"))) == ["é\r\n\nx"]
    assert documents(parse_source(str(tmp_path / "a.jsonl"))) == ["one", "two"]
    assert documents(parse_source(f"{tmp_path / 'a.parquet'}:body")) == ["p", "q"]


SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
"""Legal in a JSON string as they are (but for the last two, which JSON escapes), and line ends to str.splitlines."""


def test_only_newlines_end_the_lines_of_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"text": SEPARATORS, "answer": "a"}, ensure_ascii=False),
        json.dumps({"text": "b", "answer": "c"}),
    ]
    assert "\u2028" in lines[0]
    assert "\x85" in lines[0]
    path.write_bytes("\r\n".join(lines).encode())
    assert documents(parse_source(str(path))) == [SEPARATORS, "b"]
    assert _read_pairs(Source(str(path), "text,answer")) == [(SEPARATORS, "a"), ("b", "c")]
    path.write_text(json.dumps({"goal": SEPARATORS, "sol1": "x", "sol2": "y", "label": 0}, ensure_ascii=False))
    assert [document["goal"] for document in read_documents("piqa", path)] == [SEPARATORS]


def test_parquet_rows_without_text_are_left_out(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["p", None, "None", ""], "n": [1, None, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(parse_source(str(tmp_path / "a.parquet"))) == ["p", "None", ""]
    with pytest.raises(InputError, match="no text in column 'n'"):
        documents(parse_source(f"{tmp_path / 'a.parquet'}:n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "without the text field"),
        ("a.jsonl", b"not json", "cannot be read"),
        ("a.jsonl", b"[1]", "without the text field"),
        ("a.parquet", b"PAR1nonsense", "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        documents(parse_source(str(path)))


def test_hub_sources_ask_for_the_usual_data_sets(monkeypatch):
    asked = []

    class Rows(list):
        def take(self, n):
            return self[:n]

    def load_dataset(path, config, *, split, streaming):
        asked.append((path, config, split, streaming))
        return Rows([{"text": "a"}, {"text": ""}, {"text": "b"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert documents(Source("wikitext2"), "test") == ["a\n\n\n\nb"]
    assert documents(Source("c4")) == ["a", "", "b"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False), ("allenai/c4", "en", "train", True)]


def test_an_unreachable_hub_is_an_input_error(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError, match="cannot be loaded"):
        documents(Source("wikitext2"))


def test_held_out_text_is_never_calibrated_on(llama, text):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    count = (len(ids) - len(ids) // 10) // 64
    found = calibration_blocks([(Source("python-docs"), count, 64)], tokenizer, 0, llama)
    assert torch.equal(found.ids.flatten(), ids[: count * 64])
    held = ids[len(ids) - len(ids) // 10 :]
    assert torch.equal(found.held_out.flatten(), held[: 4 * 64])
    with pytest.raises(InputError, match="too short"):
        calibration_blocks([(Source("python-docs"), count + 1, 64)], tokenizer, 0, llama)


def test_blocks_are_drawn_by_seed_without_replacement(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    draws = [calibration_blocks([(Source("python-docs"), 20, 64)], tokenizer, s, llama) for s in (0, 0, 1)]
    assert torch.equal(draws[0].ids, draws[1].ids)
    assert not torch.equal(draws[0].ids, draws[2].ids)
    assert len(draws[0].ids.unique(dim=0)) == 20


def test_the_models_own_text(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    first, again = (calibration_blocks([(Source("self"), 3, 24)], tokenizer, 5, llama) for _ in range(2))
    assert first.ids.shape == (3, 24)
    assert first.held_out.shape == (1, 24)
    assert torch.equal(first.ids, again.ids)


HOSTILE = {
    "do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.2,
    "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(8, 200)), "min_new_tokens": 3,
    "forced_eos_token_id": 7, "bad_words_ids": [[11]], "epsilon_cutoff": 0.5, "eos_token_id": list(range(1, 100)),
}  # fmt: skip


@pytest.fixture
def steered(llama, tmp_path):
    """The tiny Llama with a generation config that leaves little to chance."""
    shutil.copytree(llama, tmp_path / "steered")
    (tmp_path / "steered/generation_config.json").write_text(json.dumps(HOSTILE))
    return tmp_path / "steered"


def test_the_models_own_text_is_drawn_by_its_probabilities_alone(llama, steered):
    """Frequencies of the first token, an end of text among them, against the softmax of the logits."""
    tokenizer, count = AutoTokenizer.from_pretrained(llama), 4000
    drawn = own_text.sample_from_model(steered, tokenizer, count, 2, 3)[:, 1]
    logits = AutoModelForCausalLM.from_pretrained(llama)(torch.tensor([[tokenizer.bos_token_id]])).logits[0, 0]
    expected = logits.detach().double().softmax(-1) * count
    assert expected[tokenizer.eos_token_id] > 1
    often = expected >= 5
    found = torch.bincount(drawn, minlength=len(expected)).double()
    pairs = [*zip(found[often].tolist(), expected[often].tolist(), strict=True)]
    pairs.append((float(found[~often].sum()), float(expected[~often].sum())))
    chi = sum((f - e) ** 2 / e for f, e in pairs if e > 0)
    freedom = len(pairs) - 1
    assert freedom > 50
    assert chi < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations of its distribution
    plain, other = (own_text.sample_from_model(folder, tokenizer, 3, 24, 5) for folder in (llama, steered))
    assert torch.equal(plain, other)


def test_the_models_own_text_begins_with_a_token_that_it_knows(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    with pytest.raises(InputError, match="makes token 320, the model knows 320"):
        own_text.sample_from_model(llama, tokenizer, 1, 8, 0)


@pytest.mark.parametrize(("weights", "samples"), [([1, 1], 32), ([3, 1], 10), ([1, 1, 1], 32), ([0.1, 5], 3)])
def test_shares_add_up(weights, samples):
    found = shares(weights, samples)
    assert sum(found) == samples
    assert all(abs(n - w / sum(weights) * samples) < 1 for n, w in zip(found, weights, strict=True))


def test_python_docs_are_always_there():
    from pydoc_data.topics import topics

    found = documents(Source("python-docs"))
    assert found == [text for _, text in sorted(topics.items())]
    assert sum(map(len, found)) > 20_000
    assert json.dumps(corpus.BUILT_IN)
