"""A model that is open: what its parts are, and what each may cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lrcompress.calibration.drawing import Calibration
from lrcompress.checkpoint.reader import CheckpointReader
from lrcompress.foreign.opening import OpenedModel
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.experts import LinearExperts
from lrcompress.model.limits import known_tokens
from lrcompress.model.targets import untouched
from lrcompress.protocols import Site
from lrcompress.stages.costs import Costs, costs
from lrcompress.stages.request import Request


@dataclass
class Opened:
    """A dense model ready to be walked. `dtype` is the one to write in."""

    request: Request
    model: OpenedModel
    reader: CheckpointReader
    skeleton: nn.Module
    walker: BlockWalker
    sites: list[Site]
    dtype: torch.dtype
    calibration: Calibration | None
    experts: dict[str, LinearExperts] = field(default_factory=dict)
    """The modules that hold experts, which the dense model has fused."""
    unread: list[str] = field(default_factory=list)
    """Targets outside the blocks that no text reaches, as those of what sees images; known once it is calibrated."""

    @property
    def blocks(self) -> list[str]:
        """Module names of the decoder blocks."""
        return self.walker.blocks

    @property
    def towers(self) -> dict[str, int]:
        """Parameters of every part with layers that lies beside the language model's blocks and has no target."""
        return untouched(self.skeleton, self.blocks, [site.name for site in self.sites])

    def left_dense(self) -> list[dict[str, Any]]:
        """The `towers` as plan.json and report.json have them."""
        return [{"name": name, "parameters": numbers} for name, numbers in self.towers.items()]

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return known_tokens(self.skeleton)

    @property
    def dense_checkpoint_bytes(self) -> int:
        """Bytes of the whole dense checkpoint at the dtype to write."""
        added = {f"{site.name}.bias" for site in self.sites if site.stored is not None and site.stored.added_bias}
        known = set(self.walker.names.values())
        metas = [self.reader.meta(name) for name in self.reader.names() if name in known and name not in added]
        return sum(meta.numel() * self.written_dtype(meta).itemsize for meta in metas)

    def written_dtype(self, tensor: torch.Tensor) -> torch.dtype:
        """A checkpoint's own dtypes are kept unless another was asked for or it came from GGUF."""
        keep = self.request.recipe.dtype == "auto" and not self.model.from_gguf
        return tensor.dtype if keep or not tensor.is_floating_point() else self.dtype

    def costs(self, joins: Sequence[Sequence[str]] = ()) -> list[Costs]:
        """The choices for every weight, priced in what the asked ratio counts; see costs.costs."""
        request, size = self.request, self.dtype.itemsize
        return costs(request.method, self.sites, len(self.blocks), size, request.recipe.ratio_of, joins)

    @property
    def embeddings(self) -> list[Site]:
        """The site of the input embeddings, if they are a target."""
        return [site for site in self.sites if site.lookup]

    def sites_of(self, block: int) -> list[Site]:
        """The sites of one block; block len(blocks) is everything outside, but for embeddings, which are the next."""
        return [site for site in self.sites if site.block == block]
