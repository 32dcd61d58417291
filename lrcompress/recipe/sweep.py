"""What a sweep says, and the recipe of each of its points."""

from pathlib import Path
from typing import Any

import pydantic

from lrcompress.recipe.checked import make_recipe
from lrcompress.recipe.schema import CalibrationSpec, DtypeName, EvaluateSpec, Fraction, MethodSpec, Recipe, Strict


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


class Sweep(Strict):
    """Methods x ratios x seeds on one model: every point is compressed and evaluated."""

    model: str
    methods: list[SweepMethod] = pydantic.Field(min_length=1)
    ratios: list[Fraction] = pydantic.Field(min_length=1)
    seeds: list[int] = pydantic.Field([0], min_length=1)
    evaluate: EvaluateSpec
    output: str
    keep: bool = False
    """Keep the checkpoints; otherwise each is deleted once it has been evaluated."""
    calibration: list[CalibrationSpec] = pydantic.Field(default_factory=lambda: [CalibrationSpec()])
    target: list[str] = pydantic.Field(default_factory=list)
    ignore: list[str] = pydantic.Field(default_factory=list)
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
