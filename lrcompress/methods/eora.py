"""EoRA: a compressed base and a low-rank correction of its error in the eigenspace of the inputs (arXiv 2410.21271)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrcompress.bases import Base, BaseOptions, Existing, parse_base
from lrcompress.errors import InputError
from lrcompress.formats import DENSE, restored, spec_bytes, stored_tensors
from lrcompress.formats.sum import Sum, part, rounded_factors
from lrcompress.grams import energy
from lrcompress.linalg.truncation import Spectrum
from lrcompress.methods.base import METHODS, MethodOptions
from lrcompress.methods.spectral import Metric, SpectralMethod, SpectralOptions
from lrcompress.precision import exact, widened
from lrcompress.protocols import Curve, InputStatistics, Site, Spec


class EoraOptions(SpectralOptions):
    """Options of eora."""

    propagation: Literal["one_pass", "sequential"] = "sequential"
    """As published: the next block's statistics are of what the corrected ones before it give."""
    metric: Metric = "input"
    """plain is plain-SVD compensation."""
    factor_bits: Literal[16, 8, 4] = 16
    """Bits of a number of the correction's factors; 16 stands for the checkpoint's dtype."""
    act_order: bool = False
    """gptq: columns of the largest inputs first, grids from the original weights."""
    clip_search: bool = False
    """rtn and gptq: per group the best of several ranges instead of the whole one."""


@METHODS.register
class Eora(SpectralMethod):
    """W ≈ base(W) + L R with L R the best low-rank approximation of W - base(W) in the metric of the inputs.

    Level 0 of a curve is the base alone, level r a correction of rank r, the last one the dense weight.
    A weight that an existing base leaves dense stays so. Where such a base has a bias, the correction fits it anew:
    the mean is then exact, whatever text the base's bias was made from.
    """

    name: ClassVar[str] = "eora"
    title: ClassVar[str] = "EoRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.21271"
    summary: ClassVar[str] = "a quantised or 2:4 base (--base), its error corrected by low rank in the inputs' metric"
    Options: ClassVar[type[MethodOptions]] = EoraOptions
    formats: ClassVar[tuple[str, ...]] = ("sum",)
    default_allocator: ClassVar[str] = "marginal_error"
    default_base: ClassVar[str | None] = "gptq:4:64"
    takes_rank: ClassVar[bool] = True
    levels_are_ranks: bool = False
    retruncates: bool = False
    options: EoraOptions

    def __init__(self, options: MethodOptions, format: str | None = None, base: str | None = None) -> None:
        super().__init__(options, format, base)
        wanted = BaseOptions(self.options.act_order, self.options.clip_search)
        self._base: Base = parse_base(str(self.base), wanted)
        for key in ("act_order", "clip_search"):
            if getattr(wanted, key) and key not in self._base.takes:
                raise InputError(f"option {key} of method {self.name} means nothing to base {self.base}: leave it out")

    @property
    def needs_statistics(self) -> bool:
        return self._base.needs_gram or super().needs_statistics

    @property
    def existing_base(self) -> Existing | None:
        return self._base if isinstance(self._base, Existing) else None

    def outputs_suffice(self, site: Site) -> bool:
        return False

    def centres(self, site: Site) -> bool:
        return super().centres(site) or (self.metric != "plain" and self._base.spec(site.shape, site.name).bias)

    def curve(self, site: Site, element_size: int) -> Curve:
        dense = site.shape[0] * site.shape[1] * element_size
        if self._base.spec(site.shape, site.name).format == DENSE:
            return Curve(site.name, torch.tensor([min(site.shape)]), torch.tensor([dense]), dense)
        first, second = (spec_bytes(self.spec(site, rank, element_size), element_size) for rank in (0, 1))
        # Every component costs the same, so the bytes of a rank need no spec of their own.
        costs = first + (second - first) * torch.arange(min(site.shape))
        costs = costs[costs < dense]
        ranks = torch.cat([torch.arange(len(costs)), torch.tensor([min(site.shape)])])
        return Curve(site.name, ranks, torch.cat([costs, torch.tensor([dense])]), dense)

    def decompose(self, site: Site, weight: Tensor, statistics: InputStatistics | None) -> dict[str, Tensor]:
        if self._base.spec(site.shape, site.name).format == DENSE:
            return {"energies": torch.zeros(min(site.shape), dtype=torch.float64), "size": torch.zeros(())}
        gram = None if statistics is None else statistics.gram()
        base = self._base.compress(weight, gram if self._base.needs_gram else None, site.name)
        error = widened(weight) - base.dense
        outputs, scale = self.output_gram(statistics), self.output_scale(statistics)
        metric = None if self.metric == "plain" else gram
        if metric is not None and statistics is not None and self.centres(site):
            metric = statistics.gram(centred=True)
        spectrum = self._spectrum(site, error, metric, outputs)
        artefact = self._artefact(site, spectrum, error, statistics)
        if self.options.factor_bits < 16:
            tail = scale * coded_errors(spectrum, error, metric, self.options.factor_bits, outputs)
            artefact["tail"] = torch.cat([tail, tail[-1:].expand(min(site.shape) + 1 - len(tail))])
        if self.centres(site) and statistics is not None:
            artefact["mean"] = statistics.mean()
        whole = energy(weight.float(), metric) if outputs is None else _inner(weight, weight, metric, outputs)
        artefact["size"] = scale * whole.clamp_min(0)
        return artefact | {f"base.{key}": tensor for key, tensor in base.tensors.items()}

    def errors(self, artefact: dict[str, Tensor], curve: Curve) -> Tensor:
        if "tail" not in artefact:
            return super().errors(artefact, curve)
        errors = artefact["tail"][curve.ranks]
        errors[-1] = 0.0
        return errors

    def total(self, artefact: dict[str, Tensor]) -> float:
        return float(artefact["size"])

    def spec(self, site: Site, rank: int, element_size: int) -> Spec:
        base = self._base.spec(site.shape, site.name)
        adds_bias = self.metric == "centred" or base.bias
        bias, added = adds_bias or site.bias, adds_bias and not site.bias
        if rank == 0:
            return Spec(base.format, site.shape, bias, added, site.conv1d, base.parameters)
        correction = {"format": "low_rank", "rank": rank, "bits": self.options.factor_bits}
        parameters = {"base": {"format": base.format, **base.parameters}, "correction": correction}
        return Spec("sum", site.shape, bias, added, site.conv1d, parameters)

    def encode(self, spec: Spec, artefact: dict[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        base = {k.removeprefix("base."): t for k, t in artefact.items() if k.startswith("base.")}
        rank = spec.rank if spec.format == Sum.name else 0
        bare = part(spec, "base") if rank else Spec(spec.format, spec.shape, parameters=spec.parameters)
        weights = {key: base[key] for key in stored_tensors(bare, torch.float32) if key in base}
        if rank == 0 and len(weights) < len(base) and self.metric != "centred":
            return base  # an existing one with its own bias
        left, right = artefact["left"][:, :rank], artefact["right"][:rank]
        if "mean" in artefact:
            stored_left, stored_right = rounded_factors(left, right, self.options.factor_bits)
            moved = artefact["mean_output"] - exact(stored_left) @ (exact(stored_right) @ artefact["mean"])
            bias = (moved if bias is None else bias.to(moved) + moved).float()
        if rank:
            return Sum.encode(weights, left, right, self.options.factor_bits, bias)
        return weights if bias is None else weights | restored(bare, weights, torch.float32).bias_tensors(bias)


def coded_errors(
    spectrum: Spectrum, error: Tensor, gram: Tensor | None, bits: int, output_gram: Tensor | None = None
) -> Tensor:
    """(k + 1,) `exact`: squared error in the metric of the first 0..k components, rounded to `bits` bits.

    ‖E - Σ_i<r b_i a_iᵀ‖² for every r from the components' inner products with E (m, n) and with each other.
    """
    left, right = rounded_factors(spectrum.left, spectrum.right, bits)
    weighted = right if gram is None else right @ gram
    outputs = left if output_gram is None else output_gram @ left
    with_error = ((outputs.T @ error) * weighted).sum(1)
    mutual = (outputs.T @ left) * (weighted @ right.T)
    own = 2 * mutual.tril(-1).sum(1) + mutual.diagonal()
    steps = exact(own - 2 * with_error)
    whole = _inner(error, error, gram, output_gram)
    return torch.cat([whole[None], whole + steps.cumsum(0)]).clamp_min(0)


def _inner(left: Tensor, right: Tensor, gram: Tensor | None, output_gram: Tensor | None) -> Tensor:
    """tr(B left G rightᵀ) of two matrices (m, n), `exact`, the identity where there is no gram."""
    left, right = widened(left), widened(right)
    left = left if gram is None else left @ gram
    return exact(((left if output_gram is None else output_gram @ left) * right).sum())
