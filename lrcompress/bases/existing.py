"""An existing checkpoint as a base: its stored tensors are taken over bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lrcompress.bases.base import Base, BaseOptions, Compressed, dense_of
from lrcompress.formats import DENSE
from lrcompress.protocols import Spec


class StoredWeights(Protocol):
    """The compressed weights of a checkpoint by the name of their module; what is not among them is dense."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """How each is stored, its bias included."""
        ...

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Its stored tensors without the empty `weight`."""
        ...


class Existing(Base):
    """The compressed weights of a checkpoint's folder; `weights` are there once it has been opened."""

    needs_gram = False
    weights: StoredWeights

    def __init__(self, folder: str, options: BaseOptions) -> None:
        super().__init__(options)
        self.folder = Path(folder).expanduser()
        self._text = folder

    @property
    def text(self) -> str:
        return self._text

    def spec(self, shape: tuple[int, int], site: str = "") -> Spec:
        return self.weights.specs.get(site, Spec(DENSE, shape))

    def compress(self, weight: Tensor, gram: Tensor | None, site: str = "") -> Compressed:
        spec = self.weights.specs[site]
        tensors = {key: tensor.to(weight.device) for key, tensor in self.weights.tensors(site).items()}
        return Compressed(spec, tensors, dense_of(spec, tensors))
