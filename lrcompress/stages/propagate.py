"""Sequential propagation: the next block's statistics are of what the compressed blocks before it give."""

import torch
from torch import Tensor, nn

from lrcompress.calibration.hidden import HiddenStates
from lrcompress.errors import InputError
from lrcompress.formats import DENSE
from lrcompress.stages.allocate import allocate
from lrcompress.stages.prepare import Opened
from lrcompress.stages.profile import Compensate
from lrcompress.stages.store import encode_site, installed


def compensation(opened: Opened) -> Compensate | None:
    """What `profile` does after a block's decomposition; None for one-pass propagation.

    The levels must be known beforehand, by a rank or an allocator that needs no errors: check_request sees to it.
    """
    if opened.request.method.options.propagation != "sequential":
        return None
    plan, walker = allocate(opened, None), opened.walker

    @torch.no_grad()
    def compensate(
        block: int, module: nn.Module, found: dict[str, dict[str, Tensor]], before: HiddenStates, after: HiddenStates
    ) -> None:
        sites = [site for site in opened.sites_of(block) if plan.specs[site.name].format != DENSE]
        specs = {site.name: plan.specs[site.name] for site in sites}
        tensors = {site.name: encode_site(opened, site, specs[site.name], found[site.name]) for site in sites}
        with installed(opened, {name: (specs[name], tensors[name]) for name in specs}):
            for sample in range(len(before)):
                hidden = walker.run(block, module, before.read(sample).to(walker.device, walker.dtype))
                if not bool(torch.isfinite(hidden).all()):
                    raise InputError(
                        f"{walker.blocks[block]}, compressed, puts out non-finite numbers on calibration sample "
                        f"{sample}: ask for less compression, or propagation=one_pass"
                    )
                after.write(sample, hidden)

    return compensate
