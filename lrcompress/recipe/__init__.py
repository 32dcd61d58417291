"""The recipe: one model for command-line flags, YAML files and Python."""

from lrcompress.recipe.checked import make_recipe, validated
from lrcompress.recipe.files import dump_recipe, load_recipe, load_sweep, shipped_recipes, split_assignment
from lrcompress.recipe.schema import HOW_MUCH, CalibrationSpec, EvaluateSpec, Recipe
from lrcompress.recipe.sweep import Sweep, SweepMethod

__all__ = [
    "HOW_MUCH",
    "CalibrationSpec",
    "EvaluateSpec",
    "Recipe",
    "Sweep",
    "SweepMethod",
    "dump_recipe",
    "load_recipe",
    "load_sweep",
    "make_recipe",
    "shipped_recipes",
    "split_assignment",
    "validated",
]
