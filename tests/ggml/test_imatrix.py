"""Importance matrices: both kinds of file, what is wrong with one, and the numbers against hooks on the model."""

import json
import struct
from pathlib import Path

import pytest
import torch

from lrcompress.errors import InputError
from lrcompress.ggml.imatrix import Importance, read_imatrix, write_imatrix
from tests.checkpoint.test_loading import load
from tests.commands import run_cli
from tests.export.converter import NAMES

CONVERTER = Path(__file__).parent.parent / "export/converter.py"


def dat(*entries: tuple[str, int, list[float]]) -> bytes:
    """A .dat file as llama-imatrix writes it: means times calls."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, len(values))]
        parts.append(struct.pack(f"<{len(values)}f", *values))
    return b"".join([*parts, struct.pack("<ii", 3, 4), b"text"])


def test_what_is_written_is_read(tmp_path):
    found = {
        "blk.0.attn_q.weight": Importance(torch.tensor([[2.0, 4.0, 0.0]]), torch.tensor([2.0])),
        "blk.0.ffn_up_exps.weight": Importance(torch.tensor([[6.0, 3.0], [0.0, 0.0]]), torch.tensor([3.0, 0.0])),
    }
    write_imatrix(tmp_path / "i.gguf", found, ["a.txt"], 8)
    read = read_imatrix(tmp_path / "i.gguf")
    assert read.keys() == found.keys()
    assert read["blk.0.attn_q.weight"].means().tolist() == [[1.0, 2.0, 0.0]]
    assert read["blk.0.ffn_up_exps.weight"].means().tolist() == [[2.0, 1.0], [1.0, 1.0]]


def test_the_older_file_is_read(tmp_path):
    (tmp_path / "i.dat").write_bytes(dat(("blk.1.attn_v.weight", 4, [8.0, 2.0]), ("output.weight", 1, [3.0])))
    read = read_imatrix(tmp_path / "i.dat")
    assert {name: one.means().tolist() for name, one in read.items()} == {
        "blk.1.attn_v.weight": [[2.0, 0.5]], "output.weight": [[3.0]],
    }  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [b"", b"GGUF", b"GGUFxxxxxxxxxxxxxxxx", dat(("w", 1, [1.0]))[:14], dat(("w", 1, [-1.0])), struct.pack("<i", 0),
     struct.pack("<ii", 1, 2**30), dat(("w", 1, [float("nan")]))],
)  # fmt: skip
def test_what_is_no_imatrix_is_refused(tmp_path, data):
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(InputError, match="imatrix"):
        read_imatrix(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_imatrix(tmp_path / "absent.gguf")


def test_calibrate_sums_squares_and_compress_reads_them(make_model, tmp_path):
    model, text, imatrix = make_model("llama"), tmp_path / "text.txt", tmp_path / "i.gguf"
    text.write_text(" ".join(f"word {n} of a text that is read" for n in range(400)))
    common = ["--converter", CONVERTER, "--calibration", text, "--samples", 3, "--seqlen", 32]
    done = run_cli("calibrate", model, "--imatrix", imatrix, *common)
    assert done.returncode == 0, done.stderr
    found = read_imatrix(imatrix)
    assert len(found) == 21
    from transformers import AutoTokenizer

    from lrcompress.calibration.corpus import parse_source
    from lrcompress.calibration.drawing import calibration_blocks

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = calibration_blocks([(parse_source(str(text)), 3, 32)], tokenizer, 0, model).ids
    loaded, squares = load(model), {}
    for name, module in loaded.named_modules():
        if name.startswith("model.layers.") and name.endswith("_proj"):
            module.register_forward_hook(
                lambda _, given, __, name=name: squares.update({name: given[0].square().flatten(0, -2).sum(0)})
            )
    with torch.no_grad():
        loaded(ids)
    for name, expected in squares.items():
        block, kind = name.removeprefix("model.layers.").split(".", 1)
        one = found[f"blk.{block}.{NAMES[kind]}.weight"]
        assert one.counts.tolist() == [96.0]
        torch.testing.assert_close(one.sums[0], expected, rtol=1e-3, atol=1e-4)
    kept = tmp_path / "kept"
    done = run_cli(
        "compress", model, "-o", tmp_path / "x.gguf", "--type", "Q4_0", "--imatrix", imatrix, "--keep", kept, *common
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((kept / "report.json").read_text())["metric"] == "plain"
    weight = loaded.model.layers[1].self_attn.q_proj.weight.detach()
    error = load(kept).model.layers[1].self_attn.q_proj.dense() - weight
    means = found["blk.1.attn_q.weight"].means()[0]
    order = means.argsort()
    assert float(error[:, order[-8:]].norm()) < float(error[:, order[:8]].norm())
