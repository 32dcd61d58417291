"""The recipe: one model for command-line flags, YAML files and Python."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml

from lrcompress.budget import Measure, parse_percent, parse_size
from lrcompress.errors import InputError, nearest

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def _size(value: Any) -> str:
    return str(_parsed(parse_size, value) and value)


def _percent(value: Any) -> float:
    return float(_parsed(parse_percent, value))


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


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class CalibrationSpec(_Strict):
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


class EvaluateSpec(_Strict):
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


class Recipe(_Strict):
    """Everything that decides what is written."""

    model: str
    method: MethodSpec
    ratio: float | None = pydantic.Field(None, gt=0, lt=1)
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
                "key 'ratio' is missing: say which fraction of the bytes to remove, or give bpw, size or max_loss "
                "(eora: or a rank)"
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


class SweepMethod(MethodSpec):
    """A method of a sweep, with the parts of a recipe that belong to it; every other key is one of its options."""

    allocator: str | None = None
    format: str | None = None
    base: str | None = None

    @property
    def label(self) -> str:
        """The method as a name for files and tables: what differs from its defaults follows its name."""
        parts = [self.format, self.allocator, self.base and Path(self.base).name.replace(":", "-")]
        options = [f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.name, *(part for part in parts if part), *options])


class Sweep(_Strict):
    """Methods x ratios x seeds on one model: every point is compressed and evaluated."""

    model: str
    methods: list[SweepMethod] = pydantic.Field(min_length=1)
    ratios: list[float] = pydantic.Field(min_length=1)
    seeds: list[int] = pydantic.Field([0], min_length=1)
    evaluate: EvaluateSpec
    output: str
    keep: bool = False
    """Keep the checkpoints; otherwise each is deleted once it has been evaluated."""
    calibration: list[CalibrationSpec] = pydantic.Field(default_factory=lambda: [CalibrationSpec()])
    target: list[str] = []
    ignore: list[str] = []
    device: str = "auto"
    dtype: DtypeName = "auto"
    trust_remote_code: bool = False

    @pydantic.field_validator("calibration", "methods", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> "Sweep":
        labels = [method.label for method in self.methods]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"method {twice} is listed twice")
        return self

    def recipe(self, method: SweepMethod, ratio: float, seed: int) -> Recipe:
        """The recipe of one point."""
        shared = self.model_dump(include={"model", "target", "ignore", "device", "dtype", "trust_remote_code"})
        return make_recipe(
            {
                **shared,
                "method": {"name": method.name, **method.options},
                "ratio": ratio,
                "seed": seed,
                "allocator": method.allocator,
                "format": method.format,
                "base": method.base,
                "calibration": [spec.model_dump() for spec in self.calibration],
            },
            f"sweep, method {method.label}",
        )


M = TypeVar("M", bound=pydantic.BaseModel)


def validated(model: type[M], data: dict[str, Any], origin: str) -> M:
    """An instance of `model`; the first mistake is an InputError naming its key (an unknown one: the nearest)."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise InputError(f"{origin}: {_explain(error, model)}") from error


def make_recipe(data: Any, origin: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; see `validated`."""
    if not isinstance(data, dict):
        raise InputError(f"{origin}: a recipe is a mapping of keys, this is {type(data).__name__}")
    if "methods" in data and "ratios" in data:
        raise InputError(f"{origin} is a sweep of several methods and ratios: run it with lrcompress sweep")
    return validated(Recipe, data, origin)


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """A YAML file, or the name of a shipped recipe, with `key.path=value` overrides."""
    path, data = _read(name, overrides)
    return make_recipe(data, str(path))


def load_sweep(name: str, overrides: list[str]) -> Sweep:
    """As load_recipe, for the YAML of a sweep."""
    path, data = _read(name, overrides)
    if not isinstance(data, dict):
        raise InputError(f"{path}: a sweep is a mapping of keys, this is {type(data).__name__}")
    return validated(Sweep, data, str(path))


def _read(name: str, overrides: list[str]) -> tuple[Path, Any]:
    path = find_recipe(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, brackets without end
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    for override in overrides:
        apply_override(data, override)
    return path, data


def find_recipe(name: str) -> Path:
    """The file `name`, or the recipe of that name that lies in the package (or beside it in a clone)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise InputError(f"recipe {name} is no file and no shipped recipe: {nearest(name, list(shipped))}")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    here = Path(__file__).resolve().parent
    for folder in (here / "recipes", here.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def split_assignment(text: str) -> tuple[str, Any]:
    """`key=value` with the value read as YAML, so that numbers, lists and true are what they look like."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text!r}: write key=value")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"--set {text!r}: the value is not valid YAML") from error
    try:  # YAML 1.1 reads 1e-3 as text
        return key, float(parsed) if isinstance(parsed, str) else parsed
    except ValueError:
        return key, parsed


def apply_override(data: Any, override: str) -> None:
    """Set `a.b.0.c=value` in nested mappings and lists."""
    path, value = split_assignment(override)
    *parents, last = path.split(".")
    here = data
    try:
        for key in parents:
            here = here[int(key)] if isinstance(here, list) else here.setdefault(key, {})
        here[int(last) if isinstance(here, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"--set {override!r}: there is no such place in the recipe") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML; reading it back gives an equal recipe."""
    data = json.loads(recipe.model_dump_json(exclude_defaults=True))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _explain(error: pydantic.ValidationError, top: type[pydantic.BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return f"unknown key {where!r}: {nearest(key, _known_keys(first['loc'][:-1], top))}"
    if first["type"] == "missing":
        return f"key {where!r} is missing"
    if not where:  # a rule on several keys together says it all itself
        return first["msg"].removeprefix("Value error, ")
    return f"{where} = {first['input']!r}: {first['msg']}"


def _known_keys(parents: tuple[int | str, ...], top: type[pydantic.BaseModel]) -> list[str]:
    models: dict[str, type[pydantic.BaseModel]] = {"calibration": CalibrationSpec, "evaluate": EvaluateSpec}
    model = models.get(str(parents[0]), top) if parents else top
    return list(model.model_fields)
