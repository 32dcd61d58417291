"""What several processes of one run tell each other, counted from the shapes."""

from lrcompress.protocols import Site
from lrcompress.stages.allocate import Plan, needs_artefacts
from lrcompress.stages.opened import Opened
from lrcompress.stages.vocabulary import heads_of


def traffic_need(opened: Opened) -> int:
    """Bytes of the float64 sums that every process takes part in; each goes over the network about twice."""
    method, sequential = opened.request.method, opened.request.sequential
    heads = heads_of(opened.embeddings)
    sites = [site for site in opened.sites if not site.lookup]
    first = not sequential or method.needs_gradients or needs_artefacts(opened) or bool(opened.embeddings)
    numbers = 0
    if method.needs_statistics:
        numbers += first * _inputs([*sites, *heads]) + sequential * _inputs(sites)
    if sequential and method.options.toward_dense:
        numbers += sum(site.shape[1] ** 2 for site in sites if site.group == site.name)
    if method.needs_gradients:
        numbers += sum((compared(opened, site) ** 2 or site.shape[0]) + 1 for site in [*sites, *heads])
        numbers += sum(site.shape[1] ** 2 + site.shape[0] + 1 for site in opened.embeddings)
    return 8 * numbers


def exchanged(opened: Opened, plan: Plan, size: int) -> int:
    """Bytes of stored tensors that one of `size` processes sends the others, whose samples run through all of them."""
    if not opened.request.sequential:
        return 0
    inside = (site.name for site in opened.sites if site.block < len(opened.blocks))
    return sum(plan.bytes[name] for name in inside) // size


def _inputs(sites: list[Site]) -> int:
    """Two counts, the sum and the second moment of every group."""
    return sum(2 + site.shape[1] + moment(site) for site in sites if site.group == site.name)


def compared(opened: Opened, site: Site) -> int:
    """Outputs whose gradients are compared with one another: none of tokens."""
    return 0 if site.of_tokens or not opened.request.method.needs_gradient_gram else site.shape[0]


def moment(site: Site) -> int:
    """Numbers of the second moment that is gathered for a site."""
    return site.shape[0 if site.by_outputs else 1] ** 2
