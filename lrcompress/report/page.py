"""One self-contained HTML page about a finished checkpoint; templates/report.html lays it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lrcompress.budget import bits_per_weight
from lrcompress.errors import InputError
from lrcompress.formats import DENSE
from lrcompress.recipe import dump_recipe, make_recipe
from lrcompress.report.finished import Evaluation, Finished, Target
from lrcompress.report.measured import measurements
from lrcompress.report.pictures import bar, rate_plot, spectrum_plot
from lrcompress.report.spectra import Spectrum
from lrcompress.report.summary import block_and_kind, caution, change

WORST = 20


@dataclass(frozen=True)
class Samples:
    """What both models wrote after each prompt; dense: None where no dense model was run, `label` names it."""

    prompts: list[str]
    compressed: list[str]
    dense: list[str] | None = None
    label: str | None = None


@dataclass(frozen=True)
class Cell:
    """A square of a heat map: its number, how strong its colour is (0 to 1), what it says when pointed at."""

    text: str
    strength: float
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Blocks by kinds of weight; a square is None where a block has no such weight."""

    title: str
    note: str
    kinds: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def make_page(
    report: Finished, folder: Path, *, spectra: dict[str, Spectrum] | None = None, samples: Samples | None = None
) -> str:
    """The page's HTML; what is not known is said in a sentence in its place."""
    environment = Environment(
        loader=PackageLoader("lrcompress.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    phases = _phases(report.seconds)
    environment.filters |= {"megabytes": megabytes, "percent": percent, "breakable": breakable, "written": written}
    return environment.get_template("report.html").render(
        report=report,
        caution=caution(
            report.metric, report.base, general=report.calibration is None or report.calibration.general
        ),
        size_bars=_size_bars(report),
        heat_maps=heat_maps(report.targets),
        plots=None if spectra is None else spectrum_plots(report.targets, spectra, marked=report.base is None),
        rates=_rates(report),
        any_cut=any(spectrum.cut for spectrum in (spectra or {}).values()),
        worst=_worst(report.targets),
        metrics=None if report.evaluation is None else metric_rows(report.evaluation),
        phases=phases,
        time_bar=bar([(f"{name}: {spent:.1f} s", spent) for name, spent in phases], "Seconds by phase"),
        recipe=None if report.recipe is None else _recipe_text(report.recipe),
        command=_command(folder),
        samples=samples,
        texts=None if samples is None else list(zip_longest(samples.prompts, samples.compressed, samples.dense or [])),
    )  # fmt: skip


def megabytes(size: float) -> str:
    """Bytes as MB of 10^6, as kB where that would be less than one."""
    return f"{size / 1e6:.1f} MB" if abs(size) >= 1e6 else f"{size / 1e3:.1f} kB"


def percent(fraction: float | None) -> str:
    """A fraction as a percentage."""
    return "–" if fraction is None else f"{fraction:.2%}"


def written(text: str) -> str:
    """What a model wrote; what would leave an empty box is said in words."""
    if text.strip():
        return text
    lines = text.count("\n")
    return f"(nothing but {lines} line breaks and {len(text) - lines} spaces)" if text else "(nothing)"


def breakable(name: str) -> Markup:
    """A dotted name that may be wrapped after its dots and underscores."""
    return Markup("{}").format(name).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def heat_maps(targets: Sequence[Target]) -> list[HeatMap]:
    """Bytes removed, the relative error where any is known, bits a weight where they are not numbers of ranks."""
    removed = _heat_map(
        targets, "Bytes removed", "percent of the dense weight's bytes",
        lambda group: 100 * (1 - sum(t.bytes for t in group) / sum(t.dense_bytes for t in group)), "{:.0f}",
    )  # fmt: skip
    found = [removed]
    if any(t.relative_error is not None for t in targets):
        found.append(_heat_map(
            targets, "Relative error", "in the method's metric: 0 is exact, 1 is as wrong as a zero weight",
            lambda group: max((t.relative_error for t in group if t.relative_error is not None), default=None),
            "{:.2f}",
        ))  # fmt: skip
    if any(t.rank == 0 and t.format != DENSE for t in targets):
        found.append(_heat_map(
            targets, "Bits a weight", "stored for every number of the weight, everything that counts included",
            lambda group: bits_per_weight(sum(t.bytes for t in group), sum(t.shape[0] * t.shape[1] for t in group)),
            "{:.2f}",
        ))  # fmt: skip
    return found


def _heat_map(targets: Sequence[Target], title: str, note: str, value: Any, style: str) -> HeatMap:
    groups: dict[tuple[int | None, str], list[Target]] = {}
    for target in targets:
        groups.setdefault(block_and_kind(target.name), []).append(target)
    values = {place: value(group) for place, group in groups.items()}
    top = max((v for v in values.values() if v is not None), default=0.0)
    kinds = list(dict.fromkeys(kind for _, kind in groups))
    blocks = sorted({block for block, _ in groups}, key=lambda block: (block is None, block or 0))

    def cell(block: int | None, kind: str) -> Cell | None:
        number = values.get((block, kind))
        if number is None:
            return None
        text = style.format(number)
        strength = max(number, 0.0) / top if top > 0 else 0.0
        names = ", ".join(f"{t.name}: {describe(t)}" for t in groups[block, kind])
        return Cell(text, strength, f"{title} {text}. {names}")

    rows = [("–" if block is None else str(block), [cell(block, kind) for kind in kinds]) for block in blocks]
    strongest = f"; the strongest colour is {style.format(top)}" if top > 0 else ""
    return HeatMap(title, note + strongest, kinds, rows)


def describe(target: Target) -> str:
    """How a weight is stored, in a few words."""
    error = "" if target.relative_error is None else f", error {target.relative_error:.3f}"
    rank = f", rank {target.rank} of {min(target.shape)}" if target.rank else ""
    return f"{target.format}{rank}, {megabytes(target.dense_bytes)} to {megabytes(target.bytes)}{error}"


def spectrum_plots(
    targets: Sequence[Target], spectra: dict[str, Spectrum], *, marked: bool
) -> list[tuple[str, Markup]]:
    """A plot per kind of weight; `marked` says whether a target's rank is a cut through these singular values."""
    kinds: dict[str, list[tuple[str, Spectrum]]] = {}
    for target in targets:
        block, kind = block_and_kind(target.name)
        spectrum, full = spectra[target.name], min(target.shape)
        title = kind if block is None else f"block {block}"
        if marked and spectrum.cut is not None:
            title += f": {target.rank} of {full} kept"
        kinds.setdefault(kind, []).append((title, spectrum if marked else Spectrum(spectrum.points, None)))
    return [(kind, spectrum_plot(lines, f"Singular values of {kind}")) for kind, lines in kinds.items()]


def _rates(report: Finished) -> Markup | None:
    """The predicted loss by bits, with a ring at what is stored; None where fewer than two points are known."""
    if report.rates is None or len(points := [(x, y) for x, y in report.rates.points if y > 0]) < 2:
        return None
    return rate_plot(points, report.ratio.bpw, "Predicted loss by bits")


def metric_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Task, metric, value with its error, the other model's, the change, the paired test."""
    return [
        (
            row.measured, row.metric, row.shown, row.other_shown or "–",
            "–" if row.other is None else change(row.metric, row.value, row.other), row.test_shown or "–",
        )
        for row in measurements(evaluation.model_dump())
    ]  # fmt: skip


def _worst(targets: Sequence[Target]) -> list[Target]:
    known = [t for t in targets if t.relative_error is not None]
    return sorted(known, key=lambda t: -(t.relative_error or 0.0))[:WORST]


def _phases(seconds: dict[str, float]) -> list[tuple[str, float]]:
    known = [(name, spent) for name, spent in seconds.items() if name != "total"]
    other = seconds.get("total", 0.0) - sum(spent for _, spent in known)
    return [*known, ("other", other)] if other > 0.05 else known


def _size_bars(report: Finished) -> list[tuple[str, int, Markup]]:
    """The whole checkpoint before and after, on one scale: compressed weights, the rest, what is gone."""
    size = report.bytes
    rest = size.checkpoint - size.targets_stored
    sizes = [("dense", size.checkpoint_dense, size.targets_dense), ("compressed", size.checkpoint, size.targets_stored)]
    longest = max(whole for _, whole, _ in sizes)
    rows = []
    for name, whole, targets in sizes:
        parts = [(f"compressed weights {megabytes(targets)}", targets), (f"everything else {megabytes(rest)}", rest)]
        gone = longest - whole
        rows.append((name, whole, bar([*parts, (f"removed {megabytes(gone)}", gone)], f"{name}: {megabytes(whole)}")))
    return rows


def _command(folder: Path) -> str:
    """What makes the checkpoint again; an export has no recipe.yaml, so it is to be saved first."""
    recipe = folder / "recipe.yaml"
    return (
        f"lrcompress run {quote(str(recipe if recipe.is_file() else recipe.name))} -o {quote(folder.name + '-again')}"
    )


def _recipe_text(data: dict[str, Any]) -> str:
    """As YAML without the defaults; word for word where this version does not know the recipe."""
    try:
        return dump_recipe(make_recipe(data))
    except InputError:
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
