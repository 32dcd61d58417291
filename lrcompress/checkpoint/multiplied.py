"""A compressed checkpoint of ours read as the dense model that it computes, to be compressed further."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.checkpoint.manifest import Manifest, check_stored, read_weight
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.errors import InputError
from lrcompress.formats import restored
from lrcompress.formats.low_rank import LowRank
from lrcompress.formats.pivoted import Pivoted
from lrcompress.model.surgery import dense_parts

FACTORED = (LowRank.name, Pivoted.name)


class Multiplied(CheckpointReader):
    """The tensors of the dense model: stored weights multiplied out as they are read, in float32."""

    def __init__(self, folder: Path, manifest: Manifest, label: str) -> None:
        super().__init__(folder)
        self._source = CheckpointReader(folder)
        check_stored(manifest, self._source)
        for name, spec in manifest.modules.items():
            if spec.format not in FACTORED:
                raise InputError(
                    f"model {label} stores {name} as {spec.format}: only {' and '.join(FACTORED)} can be truncated "
                    "further; start from the dense checkpoint"
                )
        self.specs = {name: spec.alone() for name, spec in manifest.modules.items()}
        self._stored = manifest.modules
        self._dense: dict[str, tuple[str, Tensor]] = {}
        for name, spec in self.specs.items():
            dtype = self._source.meta(f"{name}.weight").dtype
            shape = tuple(reversed(spec.shape)) if spec.conv1d else spec.shape
            self._dense[f"{name}.weight"] = name, torch.empty(shape, dtype=dtype, device="meta")
            if spec.bias:
                self._dense[f"{name}.bias"] = name, torch.empty(spec.shape[0], dtype=dtype, device="meta")

    def names(self) -> list[str]:
        """Names of the dense model's tensors, and of biases that compression added; sorted."""
        stems = tuple(f"{name}." for name in self.specs)
        return sorted([*(name for name in self._source.names() if not name.startswith(stems)), *self._dense])

    def meta(self, name: str) -> Tensor:
        """See CheckpointReader; in the dtype of the factors."""
        return self._dense[name][1] if name in self._dense else self._source.meta(name)

    @property
    def bytes(self) -> int:
        """Bytes of the dense model's tensors."""
        added = {f"{name}.bias" for name, spec in self.specs.items() if spec.added_bias}
        metas = [self.meta(name) for name in self.names() if name not in added]
        return sum(meta.numel() * meta.itemsize for meta in metas)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """See CheckpointReader."""
        yield from self._source.read([name for name in names if name not in self._dense])
        for name in names:
            if name in self._dense:
                module = self._dense[name][0]
                weight, bias = dense_parts(restored(self.specs[module], self.stored(module), torch.float32))
                if name.endswith(".bias"):
                    assert bias is not None
                    yield name, bias
                else:
                    yield name, weight.T.contiguous() if self.specs[module].conv1d else weight

    def will_read(self, names: Sequence[str]) -> None:
        """See CheckpointReader."""
        stems = tuple(f"{self._dense[name][0]}." for name in names if name in self._dense)
        kept = [name for name in names if name not in self._dense]
        self._source.will_read([*kept, *(name for name in self._source.names() if name.startswith(stems))])

    def stored(self, module: str) -> dict[str, Tensor]:
        """The tensors that are stored for a weight."""
        return read_weight(self._source, module, self._stored[module])

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """left (out, r) and right (r, in), float64, whose product is the weight."""
        layer = restored(self.specs[module], self.stored(module), torch.float64)
        assert isinstance(layer, (LowRank, Pivoted))
        return layer.factors()

    def add_biases(self, model: nn.Module) -> None:
        """Give the model's layers the biases, on the meta device, that compression added."""
        for name, spec in self.specs.items():
            if spec.added_bias:
                meta = self._dense[f"{name}.bias"][1]
                model.get_submodule(name).bias = nn.Parameter(meta.clone(), requires_grad=False)
