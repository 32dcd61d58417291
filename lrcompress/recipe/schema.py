"""What a recipe says: its keys and their types."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic

from lrcompress.budget import Measure, parse_fraction, parse_percent, parse_size
from lrcompress.errors import InputError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def _size(value: Any) -> str:
    return str(_parsed(parse_size, value) and value)


def _percent(value: Any) -> float:
    return float(_parsed(parse_percent, value))


def _fraction(value: Any) -> Any:
    return _parsed(parse_fraction, value) if isinstance(value, str) else value


def _parsed(parse: Callable[[str], float], value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("a number or a text is needed")
    try:
        return parse(str(value))
    except InputError as error:
        raise ValueError(str(error)) from error


Size = Annotated[
    str,
    pydantic.BeforeValidator(_size),
    pydantic.WithJsonSchema({"type": ["string", "integer"], "examples": ["200MB", "1.5GB"]}),
]
Loss = Annotated[
    float,
    pydantic.BeforeValidator(_percent),
    pydantic.WithJsonSchema({"type": ["string", "number"], "examples": ["2%", 0.02]}),
]


Fraction = Annotated[
    float,
    pydantic.Field(gt=0, lt=1),
    pydantic.BeforeValidator(_fraction),
    pydantic.WithJsonSchema({"type": ["string", "number"], "examples": ["20%", 0.2]}),
]
"""What is removed of a whole."""


HOW_MUCH = (
    "say how small: --bpw 3 (bits a weight), --size 60MB (the checkpoint), --ratio 0.8 (what is removed), "
    "--max-loss 2% (of perplexity) or, for eora, --rank 16"
)
"""What a command line without an amount is answered."""


class Strict(pydantic.BaseModel):
    """Keys that are not known are refused."""

    model_config = pydantic.ConfigDict(extra="forbid")


class CalibrationSpec(Strict):
    """One calibration source."""

    source: str = "python-docs"
    samples: int = pydantic.Field(32, ge=1, le=2**31)
    seqlen: int = pydantic.Field(1024, ge=8, le=2**31)


class MethodSpec(pydantic.BaseModel):
    """The method's name; every other key is one of its options."""

    model_config = pydantic.ConfigDict(extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside `name`, checked later against what the method declares."""
        return dict(self.model_extra or {})


class EvaluateSpec(Strict):
    """What to measure on the written checkpoint."""

    tasks: list[str]
    against: str | None = None
    """A model, or `dense` for the recipe's own."""
    limit: int | None = pydantic.Field(None, ge=1)
    batch_size: int | Literal["auto"] = 1
    compute_dtype: DtypeName = "auto"
    fewshot: int | None = pydantic.Field(None, ge=0)
    """Examples before every question of lm-eval's tasks; a task that fixes 0 keeps it."""
    chat_template: bool = False
    """Put the questions of lm-eval's tasks into the tokenizer's chat template."""


class Recipe(Strict):
    """Everything that decides what is written."""

    model: str
    method: MethodSpec
    ratio: Fraction | None = None
    """Fraction to remove of what `ratio_of` says, of the targets' stored bytes where it says nothing."""
    ratio_of: Measure = "bytes"
    """What the ratio counts: stored bytes, multiply-adds per token, or ranks."""
    size: Size | None = None
    """The whole checkpoint's bytes at most, such as 200MB, instead of a ratio."""
    bpw: float | None = pydantic.Field(None, gt=0, le=64)
    """Bits stored for every weight of the targets at most, everything that counts included, instead of a ratio."""
    max_loss: Loss | None = None
    """How far perplexity on held-out calibration text may rise, such as 2%, instead of a ratio."""
    rank: int | None = pydantic.Field(None, ge=0, le=2**31)
    """One rank for all weights instead of a ratio (eora: of the correction)."""
    type: str | None = None
    """ggml: the GGUF file type whose block types the weights get, such as Q4_K_M, instead of a ratio."""
    converter: str | None = None
    """ggml: llama.cpp's convert_hf_to_gguf.py, where none is on the PATH."""
    base: str | None = None
    """What eora corrects: such as rtn:4:64, or the folder of a compressed checkpoint."""
    refine: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False)
    """Minutes to train the factors against the dense model before the checkpoint is published."""
    calibration: list[CalibrationSpec] = pydantic.Field(default_factory=lambda: [CalibrationSpec()])
    output: str | None = None
    allocator: str | None = None
    format: str | None = None
    target: list[str] = []
    ignore: list[str] = []
    device: str = "auto"
    dtype: DtypeName = "auto"
    seed: int = pydantic.Field(0, ge=-(2**63), lt=2**63)
    shard_size: str = "5GB"
    memory: Size | None = None
    """Refuse to begin where more resident memory than this is predicted to be needed, such as 4GB."""
    trust_remote_code: bool = False
    evaluate: EvaluateSpec | None = None
    expect: list[str] = []

    @pydantic.field_validator("calibration", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @pydantic.field_validator("calibration")
    @classmethod
    def _one_seqlen(cls, value: list[CalibrationSpec]) -> list[CalibrationSpec]:
        if not value or len({c.seqlen for c in value}) > 1:
            raise ValueError("at least one source is needed, all of one seqlen")
        return value

    @pydantic.field_validator("method", mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _how_much(self) -> "Recipe":
        asked = {key: getattr(self, key) for key in ("ratio", "bpw", "size", "max_loss", "rank", "type")}
        given = [f"{key} {value}" for key, value in asked.items() if value is not None]
        if not given:
            raise ValueError(
                "it is not said how small: give bpw (such as bpw: 3), size (60MB), ratio (0.8), max_loss (2%) or, for "
                "eora, rank (16)"
            )
        if len(given) > 1:
            both = "were both" if len(given) == 2 else "were all"
            raise ValueError(f"{' and '.join(given)} {both} asked: give one of them")
        if self.ratio_of != "bytes" and self.ratio is None:
            raise ValueError(f"ratio_of {self.ratio_of} says what a ratio counts, {given[0]} has none: leave one out")
        return self

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to write the same files."""
        return self.model_dump(exclude={"output", "evaluate", "expect", "memory", "converter"})
