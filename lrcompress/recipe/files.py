"""Recipes as YAML files, those that are shipped among them, and `key=value` overrides."""

import json
from pathlib import Path
from typing import Any

import yaml

from lrcompress.errors import InputError, nearest
from lrcompress.recipe.checked import make_recipe, validated
from lrcompress.recipe.schema import Recipe
from lrcompress.recipe.sweep import Sweep


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
    here = Path(__file__).resolve().parents[1]
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
