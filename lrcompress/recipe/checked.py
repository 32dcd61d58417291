"""Mappings checked: the first mistake is one line that names its key."""

from typing import Any, TypeVar

import pydantic

from lrcompress.errors import InputError, nearest
from lrcompress.recipe.schema import CalibrationSpec, EvaluateSpec, Recipe

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


def _explain(error: pydantic.ValidationError, top: type[pydantic.BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return f"unknown key {where!r}: {nearest(key, _known_keys(first['loc'][:-1], top))}"
    if first["type"] == "missing":
        return f"key {where!r} is missing"
    said = first["msg"].removeprefix("Value error, ")  # pydantic's, before a rule of ours
    return said if not where else f"{where} = {first['input']!r}: {said}"  # a rule on several keys says it all itself


def _known_keys(parents: tuple[int | str, ...], top: type[pydantic.BaseModel]) -> list[str]:
    models: dict[str, type[pydantic.BaseModel]] = {"calibration": CalibrationSpec, "evaluate": EvaluateSpec}
    model = models.get(str(parents[0]), top) if parents else top
    return list(model.model_fields)
