"""Where a recipe's checkpoint goes."""

from pathlib import Path

from lrcompress.bases import is_computed
from lrcompress.foreign.opening import named_path, short_name
from lrcompress.recipe import Recipe


def output_folder(recipe: Recipe) -> Path:
    """Where the recipe's checkpoint goes."""
    base = [] if recipe.base is None else [_base_name(recipe.base)]
    name = "-".join([short_name(recipe.model), recipe.method.name, *base, _amount_name(recipe)])
    return named_path(recipe.output or name, "output")


def _amount_name(recipe: Recipe) -> str:
    """The part of how much was asked for that names an output folder."""
    if recipe.size is not None:
        return recipe.size.replace(" ", "")
    if recipe.bpw is not None:
        return f"{recipe.bpw:g}bpw"
    if recipe.max_loss is not None:
        return f"loss-{100 * recipe.max_loss:g}%"
    if recipe.type is not None:
        return recipe.type
    if recipe.ratio is None:
        return f"r{recipe.rank}"
    return f"{recipe.ratio:g}" + ("" if recipe.ratio_of == "bytes" else f"-{recipe.ratio_of}")


def _base_name(base: str) -> str:
    """The part of --base that names an output folder."""
    if is_computed(base):
        return base.replace(":", "-").replace("/", "-")
    return short_name(str(Path(base).expanduser().resolve()))
