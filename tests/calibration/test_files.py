"""Files of text and of records, plain and packed, and the chats that records hold."""

import csv
import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lrcompress.calibration.corpus import documents, parse_source, tokenise
from lrcompress.calibration.drawing import calibration_blocks
from lrcompress.errors import InputError
from lrcompress.evaluation.compare import evaluate
from lrcompress.evaluation.generation import read_prompts
from lrcompress.evaluation.zero_shot import read_documents
from lrcompress.recipe import EvaluateSpec
from lrcompress.training.rows import _read_pairs, gather

TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools: {{ tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %} calls {{ m.tool_calls | tojson }}{% endif %}{{ '\n' }}{% endfor %}"
)
LONG = "x," * 100_000
"""Longer than csv's own limit of a field."""


@pytest.fixture
def chatty(tokenizer, llama):
    found = AutoTokenizer.from_pretrained(llama)
    found.chat_template = TEMPLATE
    return found


def write(path: Path, text: str, *, mark: bool = False) -> str:
    raw = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    return str(path)


def texts(path: Path, text: str, *, field: str = "", mark: bool = False, tokenizer=None) -> list[str]:
    return documents(parse_source(write(path, text, mark=mark) + field), tokenizer=tokenizer)


ROWS = [{"text": "one\u2028é", "n": "1"}, {"text": 'two, "quoted"\nline', "n": "2"}, {"text": LONG, "n": "3"}]
WANTED = [row["text"] for row in ROWS]


def table(delimiter: str) -> str:
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, ["n", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


FORMS = {
    "a.jsonl": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "a.ndjson": "\n".join(json.dumps(row) for row in ROWS),
    "a.json": json.dumps(ROWS, indent=1),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
    "texts.json": json.dumps(WANTED),
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "A.CSV": table(","),
}


@pytest.mark.parametrize("mark", [False, True], ids=["", "marked"])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", list(FORMS))
def test_records_are_read_in_every_form(tmp_path, name, packed, mark):
    limit = csv.field_size_limit()
    assert texts(tmp_path / (name + packed), FORMS[name], mark=mark) == WANTED
    assert csv.field_size_limit() == limit
    if name != "texts.json":
        assert texts(tmp_path / (name + packed), FORMS[name], field=":n", mark=mark) == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md"])
def test_a_byte_order_mark_is_no_token(tmp_path, llama, name):
    tokenizer, plain = AutoTokenizer.from_pretrained(llama), "é one\r\ntwo\n"
    found = texts(tmp_path / name, plain, mark=True)
    assert found == [plain]
    assert tokenise(found, tokenizer).tolist() == tokenizer(plain, add_special_tokens=False).input_ids
    assert texts(tmp_path / name, plain) == [plain]


def test_a_byte_order_mark_is_no_part_of_prompts_questions_and_pairs(tmp_path):
    assert read_prompts(Path(write(tmp_path / "p.txt", "first\n\nsecond", mark=True))) == ["first", "second"]
    question = {"goal": "g", "sol1": "a", "sol2": "b"}
    path = Path(write(tmp_path / "q.jsonl", json.dumps(question), mark=True))
    write(tmp_path / "q-labels.lst", "1\n", mark=True)
    assert read_documents("piqa", path) == [question | {"label": 1}]
    pair = json.dumps([{"q": "x", "a": "y"}])
    for name in ("pairs.json", "pairs.json.gz"):
        assert _read_pairs(parse_source(write(tmp_path / name, pair, mark=True) + ":q,a")) == [("x", "y")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"data": [1]}', r"without the text field 'text' \(it has: data\)"),
        ("a.json", b"[1, 2]", r"without the text field 'text' \(it has: int\)"),
        ("a.json", b'[{"text": "x"},', "cannot be read"),
        ("a.csv", b"text,n\nx,1\ny\n", "line 3 has 1 fields of 2"),
        ("a.csv", b"text,n\nx,1,2\n", "line 2 has 3 fields of 2"),
        ("a.csv", b'text\n"x\n', "cannot be read"),
        ("a.csv", b"n\nx\n", r"without the text field 'text' \(it has: n\)"),
        ("a.txt.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:-9], "cannot be read"),
        ("a.txt", gzip.compress(b"x", mtime=0), "not UTF-8"),
        ("a.txt", "x".encode("utf-16"), "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b"\xff", mtime=0), "not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        documents(parse_source(str(tmp_path / name)))


ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
SAID = "<|user|>Why?\n<|assistant|>So.\n"
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
CHATS = [
    ({"messages": ASKED}, SAID),
    ({"conversations": SHARED, "id": "7"}, SAID),
    ({"conversations": SHARED, "system": "Be kind."}, "<|system|>Be kind.\n" + SAID),
    ({"instruction": "Why?", "input": "", "output": "So."}, SAID),
    ({"instruction": "Why?", "output": "So."}, SAID),
    ({"instruction": "Sum", "input": "1 2", "output": "3"}, "<|user|>Sum\n1 2\n<|assistant|>3\n"),
    ({"instruction": "Why?", "output": "So.", "history": [["A?", "B."]]}, "<|user|>A?\n<|assistant|>B.\n" + SAID),
    ({"messages": [*ASKED, CALL], "tools": [{"name": "f"}]}, 'tools: [{"name": "f"}]\n' + SAID
     + '<|assistant|> calls [{"name": "f"}]\n'),
    ({"conversations": SHARED, "tools": '[{"name": "f"}]'}, 'tools: [{"name": "f"}]\n' + SAID),
    ({"text": "plain", "messages": ASKED}, "plain"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "wanted"), CHATS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_chats_go_through_the_models_template(tmp_path, chatty, record, wanted, name):
    text = json.dumps([record] * 2) if name == "a.json" else "\n".join([json.dumps(record)] * 2)
    found = texts(tmp_path / name, text, tokenizer=chatty)
    assert [one.removeprefix("<s>") for one in found] == [wanted] * 2
    if "messages" in record and "text" not in record:  # as the template's own library writes it
        expected = chatty.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
        assert found == [expected] * 2


def test_chats_of_tables(tmp_path, chatty):
    import pyarrow
    import pyarrow.parquet

    rows = [{"chat": ASKED, "messages": None}, {"chat": [*ASKED, CALL], "messages": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = documents(parse_source(f"{tmp_path}/a.parquet:chat"), tokenizer=chatty)
    assert found == [f"<s>{SAID}", f'<s>{SAID}<|assistant|> calls [{{"name": "f"}}]\n']
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": ASKED}]), tmp_path / "b.parquet")
    assert documents(parse_source(f"{tmp_path}/b.parquet"), tokenizer=chatty) == [f"<s>{SAID}"]
    text = "instruction,input,output\nWhy?,,So.\n"
    assert texts(tmp_path / "a.csv", text, tokenizer=chatty) == [f"<s>{SAID}"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"cannot write record 1 of .*unknown role narrator"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "record 1 of .*has a turn of 'narrator'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "has a turn of .*'gpt'"),
        ({"messages": [{"content": "x"}]}, "a turn without role and content"),
        ({"messages": ["x"]}, "a turn without role and content"),
        ({"messages": []}, "a chat has no messages"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "'history' holds no pairs"),
        ({"messages": ASKED, "tools": "{"}, "'tools' is no JSON"),
        ({"instruction": "x"}, "without the text field"),
        ({"prompt": "x", "completion": "y"}, "without the text field 'text'"),
    ],
)
def test_chats_that_make_no_sense_are_refused(tmp_path, chatty, record, message):
    with pytest.raises(InputError, match=message):
        texts(tmp_path / "a.jsonl", json.dumps(record), tokenizer=chatty)


def test_chats_need_a_template(tmp_path, llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    with pytest.raises(InputError, match="holds chats, and the model's tokenizer has no chat template"):
        texts(tmp_path / "a.jsonl", json.dumps({"messages": ASKED}), tokenizer=tokenizer)


def test_a_template_that_begins_with_bos_begins_no_block_twice(tmp_path, chatty):
    """The tokenizer adds BOS, so every block begins with it and the text goes without."""
    from tokenizers.processors import TemplateProcessing

    path = write(tmp_path / "a.jsonl", "\n".join([json.dumps({"messages": ASKED})] * 60))
    without = calibration_blocks([(parse_source(path), 4, 32)], chatty, 0, tmp_path).ids
    chatty.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = calibration_blocks([(parse_source(path), 4, 32)], chatty, 0, tmp_path)
    assert (found.ids[:, 0] == 0).all()
    assert not (found.ids[:, 1:] == 0).any()
    assert (without == 0).any()
    plain = chatty("\n\n".join([SAID] * 60), add_special_tokens=False).input_ids
    assert all(row[1:].tolist() in [plain[i : i + 31] for i in range(0, 31 * 40, 31)] for row in found.ids)


def test_every_reader_of_text_writes_chats_by_the_template(tmp_path, chatty, llama):
    import shutil

    folder = shutil.copytree(llama, tmp_path / "model")
    chatty.save_pretrained(folder)
    chats = write(tmp_path / "a.jsonl", "\n".join([json.dumps({"messages": ASKED})] * 60))
    plain = write(tmp_path / "a.txt", "\n\n".join([f"<s>{SAID}"] * 60))
    docs = write(tmp_path / "docs.jsonl", "\n".join([json.dumps({"text": f"<s>{SAID}"})] * 60))
    rows = [gather([parse_source(path)], 8, 32, chatty, 0, folder) for path in (chats, plain)]
    assert torch.equal(rows[0][0].ids, rows[1][0].ids)
    assert torch.equal(rows[0][1].ids, rows[1][1].ids)
    values = []
    for path, other in ((chats, chats), (plain, docs)):
        found = evaluate(str(folder), EvaluateSpec(tasks=[f"tokens:{path}@32", f"text:{other}"], limit=3))["results"]
        values.append([sorted(result.items()) for result in found.values()])
    assert values[0] == values[1]
