"""Texts longer than a model's context: said, or refused where there are no positions beyond it."""

import pytest

from lrcompress.errors import InputError
from lrcompress.evaluation.compare import evaluate
from lrcompress.heal import HealSpec, heal
from lrcompress.model.limits import length_warning, longest_context
from lrcompress.model.skeleton import empty_model
from lrcompress.recipe import EvaluateSpec
from lrcompress.report.progress import Reporter
from lrcompress.training.settings import Settings
from tests.architectures import configs
from tests.conftest import compress_tiny

TABLES = {"gpt2", "opt", "gpt_bigcode"}
"""Those of the tests' architectures that have learnt their positions."""


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mpt", *sorted(TABLES)])
def test_a_context_is_found_whatever_configs_call_it(name):
    model = empty_model(configs()[name])
    assert longest_context(model.config) == 256
    assert length_warning(model, 256) is None
    if name in TABLES:
        with pytest.raises(InputError, match=r"257 tokens .* 256 positions, and it has learnt no others"):
            length_warning(model, 257)
    else:
        assert "blocks of 257 tokens are longer than the model's context, 256" in str(length_warning(model, 257))


def test_models_without_a_context_read_any_length():
    assert length_warning(empty_model(configs()["bloom"]), 10**6) is None


def test_compress_eval_and_heal_say_it(llama, tmp_path):
    calibration = {"source": "python-docs", "samples": 1, "seqlen": 264}
    report = compress_tiny(
        llama, tmp_path / "out", method={"name": "lord", "metric": "plain"}, calibration=calibration
    ).report
    said = "longer than the model's context, 256 positions"
    assert [warning for warning in report["warnings"] if said in warning and warning.startswith("--seqlen")]
    reporter = Reporter(quiet=True)
    evaluate(str(llama), EvaluateSpec(tasks=["tokens:python-docs@264"], limit=1), reporter=reporter)
    assert said in reporter.warnings[0]
    settings = Settings(steps=1, device="cpu", distill="none")
    healed = heal(HealSpec(str(tmp_path / "out"), ("python-docs",), 1, 264, None, str(tmp_path / "h"), settings))
    assert sum(said in warning for warning in healed.report["warnings"][len(report["warnings"]) :]) == 1


def test_learnt_positions_refuse_longer_texts(make_model, tmp_path):
    gpt2 = make_model("gpt2")
    calibration = {"source": "python-docs", "samples": 1, "seqlen": 264}
    with pytest.raises(InputError, match="learnt no others"):
        compress_tiny(gpt2, tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="learnt no others"):
        evaluate(str(gpt2), EvaluateSpec(tasks=["tokens:python-docs@264"], limit=1))
