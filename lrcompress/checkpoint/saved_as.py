"""Tensors of a model under the names, and in the pieces, in which transformers saves them: what other tools read."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lrcompress.model.skeleton import library_errors


class SavedAs:
    """A tensor of `model` to those that a file has of it: experts one by one, modules by their first names.

    Only what a tensor gives alone: those that transformers joins with others keep the names that they have in the
    model, which it reads too.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        found: list[Any] = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
        found = [transform for transform in found if not isinstance(transform, PrefixChange)]
        self._model, self._any = model, bool(found)
        self._joined = [
            pattern
            for transform in found
            if isinstance(transform, WeightConverter) and len(transform.target_patterns) > 1
            for pattern in transform.target_patterns
        ]
        model._weight_conversions = found  # type: ignore[assignment]
        self.planned = {name: self._saved(name, tensor) for name, tensor in tensors}
        count = Counter(name for made in self.planned.values() for name, _ in made)
        for name, tensor in tensors:
            if any(count[made] > 1 for made, _ in self.planned[name]):
                self.planned[name] = [(name, tensor)]

    def __call__(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """The tensors of the file, as in `planned`."""
        if [made for made, _ in self.planned[name]] == [name]:
            return [(name, tensor)]
        return [(made, part.contiguous()) for made, part in self._saved(name, tensor)]

    def _saved(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        from transformers.core_model_loading import revert_weight_conversion

        if not self._any or any(pattern in name for pattern in self._joined):
            return [(name, tensor)]
        with library_errors(f"{name} cannot be written as transformers saves it"):
            made: dict[str, Tensor] = revert_weight_conversion(self._model, {name: tensor})  # type: ignore[arg-type]
        return list(made.items())
