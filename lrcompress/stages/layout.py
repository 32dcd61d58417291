"""The order of everything that is written."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.formats import DENSE, stored_tensors
from lrcompress.model.experts import experts_of, stand_ins
from lrcompress.stages.allocate import Plan
from lrcompress.stages.encode import Encoder
from lrcompress.stages.opened import Opened


def stand_ins_of(opened: Opened, plan: Plan) -> dict[str, list[str]]:
    """Modules whose experts are stored as linear layers, with the fused weights that an empty tensor stands for."""
    return stand_ins(opened.skeleton, [name for name, spec in plan.specs.items() if spec.format != DENSE])


class Layout:
    """The order of everything that is written: outside of the blocks first, then block by block."""

    def __init__(self, opened: Opened, plan: Plan) -> None:
        self._opened, self._plan = opened, plan
        self.planned: list[tuple[str, Tensor]] = []
        self._begins: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self._own: dict[int, list[str]] = {}
        self._stand_ins = stand_ins_of(opened, plan)
        self._empty = {f"{holder}.{key}" for holder, keys in self._stand_ins.items() for key in keys}
        self._compressed = {n: s for n, s in plan.specs.items() if s.format != DENSE}
        embeddings = [site for site in opened.embeddings if site.name in self._compressed]
        self._following = {f"{site.head}.weight": f"{site.name}.weight" for site in embeddings}
        stems = {block + ".": i for i, block in enumerate(opened.blocks)}
        for name in self._names():
            index = next((i for stem, i in stems.items() if name.startswith(stem)), len(stems))
            self._own.setdefault(index, []).append(name)
        for index in [len(stems), *range(len(stems))]:
            self._begins[index] = len(self.planned)
            for name in self._own.get(index, []):
                self.planned += self._plan_tensor(name)
            self.ends[index] = len(self.planned)

    def _names(self) -> list[str]:
        """Names of the dense model's tensors, experts fused as there unless one of theirs is compressed.

        Those follow the empty tensors that stand for the fused ones. A head that follows embeddings has none.
        """
        experts = self._opened.experts
        found: dict[str, None] = {}
        for known in self._opened.walker.names:
            name = self._following.get(known, known)
            holder, kept = experts_of(name, experts), self._opened.reader.kept_as(known)
            if kept:
                self._refuse_compressed(name, kept)
                found |= dict.fromkeys(kept)
            elif holder is None:
                found[name] = None
            elif holder in self._stand_ins:
                found |= dict.fromkeys([*(f"{holder}.{key}" for key in self._stand_ins[holder]), name])
            else:
                found |= dict.fromkeys(f"{holder}.{key}" for key in experts[holder].fused_shapes())
        return list(found)

    def _refuse_compressed(self, name: str, kept: list[str]) -> None:
        """InputError where a weight is compressed that the files keep as another one."""
        module = name.rpartition(".")[0]
        if module in self._compressed:
            raise InputError(
                f"{module} is stored as {kept[0]}, which transformers converts whenever it loads: leave it out "
                f"(--ignore {module})"
            )

    def _key(self, name: str) -> str:
        """What the reader calls a tensor that is written as it is."""
        return self._opened.walker.names.get(name, name)

    def _plan_tensor(self, name: str) -> list[tuple[str, Tensor]]:
        module, _, leaf = name.rpartition(".")
        if name in self._empty:
            return [(name, torch.empty(0, dtype=self._opened.dtype, device="meta"))]
        if module not in self._compressed:
            meta = self._opened.reader.meta(self._key(name))
            return [(name, torch.empty(meta.shape, dtype=self._opened.written_dtype(meta), device="meta"))]
        if leaf != "weight":
            return []
        stored = stored_tensors(self._compressed[module], self._opened.dtype)
        return [(f"{module}.{key}", tensor) for key, tensor in stored.items()]

    def tensors(
        self, block: int, encoder: Encoder, wanted: Callable[[int], bool] = lambda position: True
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a block in the planned order, those whose position in `planned` is wanted."""
        position = self._begins[block]
        for name in self._own.get(block, []):
            module, _, leaf = name.rpartition(".")
            if name in self._empty or module not in self._compressed:
                if wanted(position):
                    yield name, self._kept(name)
                position += 1
            elif leaf == "weight":
                for key in stored_tensors(self._compressed[module], self._opened.dtype):
                    if wanted(position):
                        yield f"{module}.{key}", encoder(module)[key]
                    position += 1

    def _kept(self, name: str) -> Tensor:
        """A tensor of the dense model, or the empty one that stands for experts that are no longer fused."""
        if name in self._empty:
            return torch.empty(0, dtype=self._opened.dtype)
        tensor = self._opened.reader.tensor(self._key(name))
        written = tensor.to(self._opened.written_dtype(tensor))
        if written.dtype != tensor.dtype and not all_finite(written):
            raise InputError(f"{name} does not fit into {written.dtype}: write --dtype bfloat16 or float32")
        return written
