"""EoRA from end to end on tiny models: how much is stored, and what is refused."""

import json

import pytest

from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.pipeline import make_plan
from lrcompress.recipe import dump_recipe, make_recipe
from lrcompress.report.inspection import inspect_model
from lrcompress.stages.naming import output_folder
from tests.conftest import compress_tiny
from tests.test_pipeline import header_bytes, recipe


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("base", ["gptq:3:16", "wanda:2:4"])
@pytest.mark.parametrize("allocator", [None, "uniform"])
def test_stored_ratio_is_counted_from_the_files(make_model, tmp_path, architecture, base, allocator):
    method = {"name": "eora", "factor_bits": 8}
    result = compress_tiny(
        make_model(architecture), tmp_path / "out", method=method, base=base, ratio=0.35, allocator=allocator
    )
    report = result.report
    for target in report["targets"]:
        bias = 4 * target["shape"][0] if architecture == "gpt2" else 0
        assert target["bytes"] == header_bytes(result.folder, target["name"] + ".") - bias
    stored = sum(target["bytes"] for target in report["targets"])
    assert report["ratio"]["stored"] == pytest.approx(1 - stored / report["bytes"]["targets_dense"])
    assert 0.35 <= report["ratio"]["stored"] <= 0.37
    assert report["base"] == base
    assert report["allocator"] == (allocator or "marginal_error")
    assert report["bytes"]["checkpoint"] == CheckpointReader(result.folder).bytes
    shown = {t["name"]: (t["format"], t["rank"], t["bytes"]) for t in inspect_model(str(result.folder))["targets"]}
    assert shown == {t["name"]: (t["format"], t["rank"], t["bytes"]) for t in report["targets"]}


def test_a_rank_instead_of_a_ratio(llama, tmp_path):
    changes = {"method": "eora", "base": "rtn:3:16", "rank": 4, "ratio": None}
    plan = make_plan(recipe(llama, **changes))
    report = compress_tiny(llama, tmp_path / "out", **changes).report
    assert report["ratio"]["asked"] is None
    assert {t["rank"] for t in report["targets"]} == {4}
    keys = ("name", "format", "rank", "bytes")
    assert [[t[k] for k in keys] for t in plan["targets"]] == [[t[k] for k in keys] for t in report["targets"]]
    assert all(t["relative_error"] is None for t in plan["targets"])
    assert all(t["relative_error"] > 0 for t in report["targets"])


def test_a_rank_that_is_not_smaller_than_dense_stays_dense(llama, tmp_path):
    report = compress_tiny(llama, tmp_path / "out", method="eora", base="rtn:8:16", rank=30, ratio=None).report
    assert {t["format"] for t in report["targets"]} == {"dense"}


def test_the_plan_is_what_is_written(llama, tmp_path):
    changes = {"method": {"name": "eora", "propagation": "one_pass"}, "base": "gptq:3:16", "ratio": 0.6}
    plan, report = make_plan(recipe(llama, **changes)), compress_tiny(llama, tmp_path / "out", **changes).report
    keys = ("name", "format", "rank", "bytes", "relative_error")
    assert [[t[k] for k in keys] for t in plan["targets"]] == [[t[k] for k in keys] for t in report["targets"]]


def test_a_higher_rank_errs_less_and_the_base_alone_most(llama, tmp_path):
    errors = []
    for rank in (0, 2, 6):
        report = compress_tiny(
            llama, tmp_path / str(rank), method="eora", base="rtn:2:16", rank=rank, ratio=None
        ).report
        errors.append([t["relative_error"] for t in report["targets"]])
    assert all(a > b > c for a, b, c in zip(*errors, strict=True))


def test_the_largest_ratio_that_a_base_allows_is_named_and_possible(llama, tmp_path):
    changes = {"method": "eora", "base": "rtn:4:16"}
    with pytest.raises(
        InputError, match=r"more than base rtn:4:16 alone removes: ask for a ratio of at most"
    ) as refused:
        compress_tiny(llama, tmp_path / "out", ratio=0.95, **changes)
    largest = float(str(refused.value).split("at most ")[1].split(",")[0])
    assert not (tmp_path / "out").exists()
    report = compress_tiny(llama, tmp_path / "out", ratio=largest, **changes).report
    assert largest <= report["ratio"]["stored"] < largest + 0.001
    with pytest.raises(InputError, match="at most"):
        compress_tiny(llama, tmp_path / "other", ratio=largest + 0.0002, **changes)


def test_data_free_compensation_reads_no_text(llama, tmp_path):
    changes = {"method": {"name": "eora", "metric": "plain"}, "base": "rtn:3:16", "rank": 2, "ratio": None}
    result = compress_tiny(llama, tmp_path / "out", **changes)
    other = compress_tiny(llama, tmp_path / "other", seed=3, **changes)
    assert result.report["calibration"] is None
    first, second = ((r.folder / "model.safetensors").read_bytes() for r in (result, other))
    assert first == second


def test_marginal_error_serves_the_other_methods(llama, tmp_path):
    for method in ("lord", "welore"):
        report = compress_tiny(llama, tmp_path / method, method=method, ratio=0.3, allocator="marginal_error").report
        assert 0.3 <= report["ratio"]["stored"] <= 0.32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lord", "ratio": None, "rank": 3}, "method lord takes no --rank 3"),
        ({"method": "welore", "base": "rtn:4:64"}, "method welore takes no --base"),
        ({"method": "eora", "rank": 3}, "both asked"),
        ({"method": "eora", "ratio": None}, "it is not said how small: give bpw"),
        ({"method": "eora", "ratio": None, "rank": -1}, "rank"),
        ({"method": "eora", "ratio": None, "rank": 2, "allocator": "uniform"}, "nothing to decide"),
        ({"method": "eora", "base": "rtn:6:64"}, "rtn:BITS:GROUP"),
        ({"method": "eora", "base": "rtm:4:64"}, "did you mean 'rtn'"),
        ({"method": "eora", "format": "low_rank"}, "no format"),
    ],
)
def test_refusals(llama, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        compress_tiny(llama, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_output_folder_and_recipe_round_trip(llama):
    data = {"model": str(llama), "method": "eora", "base": "rtn:3:64", "rank": 0}
    made = make_recipe(data)
    assert output_folder(made).name == f"{llama.name}-eora-rtn-3-64-r0"
    assert "ratio" not in dump_recipe(made)
    assert json.loads(made.model_dump_json())["ratio"] is None
    assert output_folder(make_recipe({**data, "rank": None, "ratio": 0.7})).name == f"{llama.name}-eora-rtn-3-64-0.7"
    assert (
        output_folder(make_recipe({"model": str(llama), "method": "lord", "ratio": 0.2})).name
        == f"{llama.name}-lord-0.2"
    )
