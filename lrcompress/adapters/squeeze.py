"""A LoRA adapter as a smaller one (LoRA-Squeeze, arXiv 2602.10993): every update truncated from its small core.

All updates get one rank, which every reader of adapters takes; with ranks of their own which update keeps how many
components is decided by their energies, over all modules at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress.adapters.inputs import Inputs, input_grams
from lrcompress.adapters.written import Written, common_rank, write_squeezed
from lrcompress.budget import check_ratio
from lrcompress.errors import InputError
from lrcompress.foreign.adapter import Adapter, open_adapter
from lrcompress.foreign.one_rank import adapter_dtype
from lrcompress.foreign.opening import short_name
from lrcompress.linalg.ranks import ranks_for_error, ranks_within
from lrcompress.linalg.truncation import Spectrum, product_energy, randomised, retruncate
from lrcompress.report.progress import Reporter
from lrcompress.report.summary import span, versions
from lrcompress.stages.workspace import new_folder, write_json


@dataclass(frozen=True)
class Amount:
    """How small: one of the rank, the fraction of the factors' bytes to remove, the relative error of all updates.

    per_module: every module gets a rank of its own by its energy, `rank` is their mean; else all have one.
    """

    rank: int | None = None
    ratio: float | None = None
    error: float | None = None
    per_module: bool = False

    def check(self) -> None:
        """InputError unless exactly one is given, in its range."""
        given = [f"--{key}" for key in ("rank", "ratio", "error") if getattr(self, key) is not None]
        if len(given) != 1:
            raise InputError(f"give one of --rank, --ratio and --error, not {' and '.join(given) or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--rank {self.rank}: PEFT needs a rank of at least 1")
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.error is not None and not 0.0 < self.error < 1.0:
            raise InputError(f"--error {self.error:g} is outside (0, 1): it is relative to the updates' norm")

    @property
    def text(self) -> str:
        """As a part of a folder's name."""
        return f"r{self.rank}" if self.rank else f"{self.ratio:g}" if self.ratio else f"error-{self.error:g}"


def squeeze(
    label: str,
    output: Path | None,
    amount: Amount,
    *,
    inputs: Inputs | None = None,
    randomised_seed: int | None = None,
    dtype: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write the adapter `label` truncated to `amount`; returns the report. What is no linear layer's update is kept,
    where all get one rank padded to it.

    With a `randomised_seed` the decompositions are randomised ones, good for ranks far below the adapter's.
    """
    reporter = reporter or Reporter(quiet=True)
    amount.check()
    wanted = adapter_dtype(dtype)
    if randomised_seed is not None and (amount.error is not None or inputs is not None):
        raise InputError(
            "--randomized needs to know how many components: it goes with --rank or --ratio, without --base"
        )
    adapter = open_adapter(label)
    folder = output or Path(f"{short_name(label)}-squeezed-{amount.text}")
    _check_amount(adapter, amount)
    if inputs is not None:
        spectra = {name: truncated(adapter, name, gram) for name, gram in input_grams(adapter, inputs, reporter)}
        spectra = {name: spectra[name] for name in adapter.linear}
    elif randomised_seed is None:
        spectra = {name: truncated(adapter, name) for name in adapter.linear}
    else:
        spectra = _randomised(adapter, amount, randomised_seed)
    totals = {name: float(spectrum.energies.sum()) for name, spectrum in spectra.items()}
    if randomised_seed is not None:
        totals = {name: product_energy(*adapter.factors(name)) for name in spectra}
    ranks = _ranks(adapter, amount, spectra)
    written = Written(adapter, ranks, None if amount.per_module else common_rank(adapter, ranks), wanted)
    report = _report(written, amount, folder, spectra, totals)
    report |= {"metric": "plain" if inputs is None else "input", "base": None if inputs is None else inputs.base,
               "randomized": randomised_seed is not None}  # fmt: skip
    if not dry_run:
        with new_folder([adapter.folder], folder, overwrite=overwrite) as partial:
            write_squeezed(written, spectra, partial)
            write_json(partial / "report.json", report)
            (partial / "README.md").write_text(_card(report), encoding="utf8")
    return report


def _check_amount(adapter: Adapter, amount: Amount) -> None:
    """InputError where the adapter is as small as that already, or cannot become so small."""
    linear = adapter.linear
    if not linear:
        raise InputError(f"adapter {adapter.label} has no update of a linear layer: there is nothing to squeeze")
    ranks = [lora.rank for lora in linear.values()]
    mean = sum(ranks) / len(ranks)
    if amount.rank is not None and amount.rank >= (mean if amount.per_module else max(ranks)):
        has = f"a mean rank of {mean:g}" if amount.per_module else f"rank {max(ranks)}"
        raise InputError(f"--rank {amount.rank}: the adapter has {has} already, ask for less")
    if amount.ratio is not None:
        least = 1 - sum(adapter.bytes(name) / lora.rank for name, lora in linear.items()) / _bytes(adapter)
        if amount.ratio > least:
            raise InputError(f"--ratio {amount.ratio:g}: rank 1 everywhere removes {least:.4f}, ask for at most that")


def _bytes(adapter: Adapter) -> int:
    return sum(adapter.bytes(name) for name in adapter.linear)


def truncated(adapter: Adapter, module: str, gram: Tensor | None = None) -> Spectrum:
    """The components of a module's update, in the metric of its inputs where there is a Gram; factors in float32."""
    spectrum = retruncate(*adapter.factors(module), gram)
    return Spectrum(spectrum.left.float(), spectrum.right.float(), spectrum.energies)


def _randomised(adapter: Adapter, amount: Amount, seed: int) -> dict[str, Spectrum]:
    """As `truncated` for every module, as many components as it may get."""
    found = {}
    for i, (name, lora) in enumerate(adapter.linear.items()):
        generator = torch.Generator().manual_seed(seed + i)
        spectrum = randomised(*adapter.factors(name), _most(lora.rank, amount), generator)
        found[name] = Spectrum(spectrum.left.float(), spectrum.right.float(), spectrum.energies)
    return found


def _most(rank: int, amount: Amount) -> int:
    """Components that a randomised decomposition finds: twice what a module gets on average."""
    mean = amount.rank if amount.rank is not None else (1 - (amount.ratio or 0.0)) * rank
    return min(rank, int(2 * mean) + 1)


def _ranks(adapter: Adapter, amount: Amount, spectra: dict[str, Spectrum]) -> dict[str, int]:
    energies = [spectrum.energies for spectrum in spectra.values()]
    if not amount.per_module:
        rank = _one_rank(adapter, amount, energies)
        return {name: min(rank, len(spectrum.energies)) for name, spectrum in spectra.items()}
    if amount.rank is not None:
        found = ranks_within(energies, [1] * len(energies), amount.rank * len(energies))
    else:
        costs = [adapter.bytes(name) // adapter.modules[name].rank for name in spectra]
        if amount.ratio is not None:
            found = ranks_within(energies, costs, int((1 - amount.ratio) * _bytes(adapter)))
        else:
            assert amount.error is not None
            found = ranks_for_error(energies, costs, amount.error)
    return dict(zip(spectra, found, strict=True))


def _one_rank(adapter: Adapter, amount: Amount, energies: list[Tensor]) -> int:
    """The largest rank of all within the bytes asked for, or the least that errs as little as asked for."""
    if amount.rank is not None:
        return amount.rank
    if amount.ratio is not None:
        each = sum(adapter.bytes(name) // lora.rank for name, lora in adapter.linear.items())
        return int((1 - amount.ratio) * _bytes(adapter) / each)
    assert amount.error is not None
    limit = amount.error**2 * sum(float(found.sum()) for found in energies)
    longest = max(len(found) for found in energies)
    return next(r for r in range(1, longest + 1) if r == longest or sum(float(f[r:].sum()) for f in energies) <= limit)


def _report(
    written: Written, amount: Amount, output: Path, spectra: dict[str, Spectrum], totals: dict[str, float]
) -> dict[str, Any]:
    adapter, ranks = written.adapter, written.ranks
    modules: list[dict[str, Any]] = []
    lost = 0.0
    for name, spectrum in spectra.items():
        lora, rank = adapter.modules[name], ranks[name]
        assert lora.shape is not None
        before, total = adapter.bytes(name), totals[name]
        # A randomised decomposition left components out: what they sum up to is known.
        rest = float(spectrum.energies[rank:].sum()) + max(total - float(spectrum.energies.sum()), 0.0)
        lost += rest
        modules.append({
            "name": name, "shape": list(lora.shape), "rank_before": lora.rank, "rank": rank, "bytes_before": before,
            "bytes": written.bytes(name), "relative_error": (rest / total) ** 0.5 if total > 0 else 0.0,
        })  # fmt: skip
    others = [written.other(name, adapter.reader.meta(name)) for name in adapter.others]
    carried = sum(meta.numel() * meta.itemsize for meta in others)
    total = sum(totals.values())
    before, after = (sum(m[key] for m in modules) for key in ("bytes_before", "bytes"))
    return {
        "schema": 1,
        "adapter": adapter.label,
        "output": str(output),
        "asked": {key: getattr(amount, key) for key in ("rank", "ratio", "error", "per_module")},
        "bytes": {"before": before, "after": after, "carried": carried},
        "ratio": 1 - after / before,
        "relative_error": (lost / total) ** 0.5 if total > 0 else 0.0,
        "modules": modules,
        "carried": adapter.others,
        "versions": versions(),
    }


def _card(report: dict[str, Any]) -> str:
    """README.md of the adapter."""
    size = report["bytes"]
    return f"""---
library_name: peft
tags: [lrcompress, lora]
---
# {report["adapter"]}, squeezed

Every update of the adapter truncated to its best low-rank approximation by lrcompress. Load it with PEFT as any other.

| | before | after |
|---|---|---|
| bytes of the factors | {size["before"]} | {size["after"]} |
| ranks | {span([m["rank_before"] for m in report["modules"]])} | {span([m["rank"] for m in report["modules"]])} |

Relative error of all updates: {report["relative_error"]:.4f} (metric {report["metric"]}).
"""
