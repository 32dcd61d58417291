"""Small pictures as inline SVG, coloured by the page's own CSS; everything that is text is escaped."""

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

from lrcompress.report.spectra import Spectrum

WIDTH, HEIGHT = 280, 170
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 22


def bar(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """One horizontal bar of the parts in a row, as long as their sum; negative ones are left out."""
    total = sum(max(size, 0.0) for _, size in parts) or 1.0
    pieces, x = [], 0.0
    for number, (name, size) in enumerate(parts):
        width = 100 * max(size, 0.0) / total
        pieces.append(
            Markup('<rect class="part{}" x="{:.3f}" width="{:.3f}" height="8"><title>{}</title></rect>').format(
                number, x, width, name
            )
        )
        x += width
    head = Markup('<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{}">')
    return head.format(label) + Markup("").join(pieces) + Markup("</svg>")


def spectrum_plot(lines: Sequence[tuple[str, Spectrum]], label: str) -> Markup:
    """Singular values against their number, log scale; a line per spectrum, first ones pale, a ring where it is cut.

    Zeros, and what is below 1e-6 of the largest value, lie on the lower edge.
    """
    largest = max((value for _, s in lines for _, value in s.points), default=0.0) or 1.0
    smallest = min(max(value, 1e-6 * largest) for _, s in lines for _, value in s.points)
    low, high = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    high = max(high, low + 1)
    count = max(number for _, s in lines for number, _ in s.points)

    def at(number: int, value: float) -> tuple[float, float]:
        height = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        x = LEFT + (number - 1) / max(count - 1, 1) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (1 - height) * (HEIGHT - TOP - BOTTOM)

    body = _axes(low, high, "1", str(count))
    for order, (name, spectrum) in enumerate(lines):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in spectrum.points))
        strength = 0.3 + 0.7 * (order + 1) / len(lines)
        body += Markup('<polyline class="line" opacity="{:.2f}" points="{}"><title>{}</title></polyline>').format(
            strength, points, name
        )
    for name, spectrum in lines:
        if spectrum.cut is not None:
            x, y = at(*spectrum.cut)
            body += Markup('<circle class="cut" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>').format(
                x, y, name
            )
    head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return head + body + Markup("</svg>")


def rate_plot(points: Sequence[tuple[float, float]], stored: float | None, label: str) -> Markup:
    """Positive losses, log scale, against bits, in rising order; a ring on the line where so many bits are stored."""
    logs = [(bits, math.log10(loss)) for bits, loss in points]
    (least, top), (most, bottom) = logs[0], logs[-1]
    low, high = math.floor(min(top, bottom)), max(math.ceil(max(top, bottom)), math.floor(min(top, bottom)) + 1)

    def at(bits: float, loss: float) -> tuple[float, float]:
        x = LEFT + (bits - least) / (most - least) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in logs))
    body = _axes(low, high, f"{least:g}", f"{most:g} bits")
    body += Markup('<polyline class="line" opacity="1.00" points="{}"><title>{}</title></polyline>').format(
        places, label
    )
    for (left, before), (right, after) in itertools.pairwise(logs):
        if stored is not None and left <= stored < right:
            x, y = at(stored, before + (after - before) * (stored - left) / (right - left))
            body += Markup('<circle class="cut" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>').format(
                x, y, f"stored: {stored:.2f} bits"
            )
    head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return head + body + Markup("</svg>")


def _axes(low: int, high: int, first: str, last: str) -> Markup:
    body, right, bottom = Markup(""), WIDTH - RIGHT, HEIGHT - BOTTOM
    for power in range(low, high + 1, max(1, (high - low) // 4)):
        y = TOP + (high - power) / (high - low) * (bottom - TOP)
        body += Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, right)
        body += Markup('<text x="{}" y="{:.1f}" text-anchor="end">{:g}</text>').format(LEFT - 4, y + 3.5, 10.0**power)
    body += Markup('<text x="{}" y="{}">{}</text>').format(LEFT, HEIGHT - 6, first)
    return body + Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(right, HEIGHT - 6, last)
