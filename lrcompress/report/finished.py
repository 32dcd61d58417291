"""report.json of a finished checkpoint, checked: what lies in a folder may be damaged, or come from anyone."""

from pathlib import Path
from typing import Any, Literal

import pydantic

from lrcompress.budget import Measure
from lrcompress.errors import InputError
from lrcompress.recipe import validated
from lrcompress.report.summary import answer, read_report


class Target(pydantic.BaseModel):
    """One weight; relative_error is None where it is not known."""

    name: str
    format: str
    shape: tuple[pydantic.PositiveInt, pydantic.PositiveInt]
    rank: pydantic.NonNegativeInt
    bytes: pydantic.NonNegativeInt
    dense_bytes: pydantic.PositiveInt
    relative_error: pydantic.FiniteFloat | None = None

    @property
    def removed(self) -> float:
        """Fraction of the bytes; negative where the weight grew."""
        return 1 - self.bytes / self.dense_bytes


class Ratio(pydantic.BaseModel):
    """Fractions of bytes removed."""

    asked: pydantic.FiniteFloat | None
    stored: pydantic.FiniteFloat
    whole_model: pydantic.FiniteFloat
    of: Measure = "bytes"
    counted: pydantic.FiniteFloat | None = None
    bpw: pydantic.PositiveFloat | None = None


class Search(pydantic.BaseModel):
    """How a ratio was found for a loss that was allowed."""

    max_loss: pydantic.FiniteFloat
    dense_perplexity: pydantic.FiniteFloat
    loss: pydantic.FiniteFloat
    ratio: pydantic.FiniteFloat
    candidates: list[dict[str, Any]]


class Rates(pydantic.BaseModel):
    """Bits a weight and the loss that was predicted there, fewest bits first."""

    unit: Literal["nats", "relative"]
    points: list[tuple[pydantic.PositiveFloat, pydantic.FiniteFloat]]


class Sizes(pydantic.BaseModel):
    """Bytes of the targets before and after, and of the whole checkpoint after."""

    targets_dense: pydantic.NonNegativeInt
    targets_stored: pydantic.NonNegativeInt
    checkpoint: pydantic.NonNegativeInt

    @property
    def checkpoint_dense(self) -> int:
        """Bytes of the whole checkpoint before."""
        return self.checkpoint + self.targets_dense - self.targets_stored


class Part(pydantic.BaseModel):
    """What lies beside the blocks and stays dense."""

    name: str
    parameters: pydantic.NonNegativeInt


class Calibration(pydantic.BaseModel):
    """The text that was read."""

    sources: list[str]
    tokens: int
    general: bool


class Test(pydantic.BaseModel):
    """Of whether two models differ on the same items."""

    p_value: float
    significant: bool


class Measured(pydantic.BaseModel):
    """Metrics by task of one model."""

    model: str
    results: dict[str, dict[str, Any]]


class Against(Measured):
    """The model beside it, and paired tests by task and metric."""

    tests: dict[str, dict[str, Test]] = {}


class Expectation(pydantic.BaseModel):
    """What a recipe demanded."""

    expression: str
    value: float
    limit: float
    met: bool


class Evaluation(Measured):
    """The contract's eval JSON."""

    against: Against | None = None
    expectations: list[Expectation] = []
    seconds: dict[str, pydantic.FiniteFloat] = {}


class Finished(pydantic.BaseModel):
    """The contract's report.json; keys that older versions did not write have defaults."""

    model: str
    method: str
    metric: str | None = None
    allocator: str | None = None
    base: str | None = None
    recipe: dict[str, Any] | None = None
    ratio: Ratio
    bytes: Sizes
    calibration: Calibration | None = None
    seconds: dict[str, pydantic.FiniteFloat] = {}
    peak_rss_bytes: pydantic.NonNegativeInt | None = None
    targets: list[Target] = pydantic.Field(min_length=1)
    left_dense: list[Part] = []
    warnings: list[str] = []
    versions: dict[str, str] = {}
    evaluation: Evaluation | None = None
    exported_from: str | None = None
    search: Search | None = None
    rates: Rates | None = None

    @property
    def answer(self) -> str | None:
        """What was asked for and what came of it, where that was not a ratio of bytes or a rank."""
        return answer(self.model_dump(include={"ratio", "search"}), self.recipe or {})


def read_finished(label: str, folder: Path) -> Finished:
    """The report of the checkpoint that the user named `label`; InputError where it has none or a damaged one."""
    data = read_report(folder)
    if data is None:
        raise InputError(f"{label} has no report.json: name the folder of a finished compression")
    return validated(Finished, data, str(folder / "report.json"))
