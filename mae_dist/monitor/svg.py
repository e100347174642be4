"""Curves as inline SVG in an HTML figure. Colours are CSS classes (report.css), so one text serves light and dark.

Pure functions from named series of numbers to text that is well-formed as XML and as HTML. Every name is escaped; there
are no scripts, and nothing is loaded from anywhere.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import NamedTuple

NUM_COLOURS = 7
DASHES = ("", "7 3", "2 3")
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 10, 30
MAX_POINTS = 500
MAX_POINTS_SMALL = 120
MAX_TOOLTIPS = 100
MAX_DOTS = 30


@dataclass(frozen=True)
class Series:
    """A named curve. `points` are finite (x, y) with x ascending; of several with one x, for several runs, the mean is
    drawn. `marks` are the x of vertical lines.

    `style` is the number of the curve on the page: it decides colour and dashes, the same in every plot.
    """

    name: str
    style: int
    points: Sequence[tuple[float, float]]
    marks: Sequence[float] = ()


class Box(NamedTuple):
    """Where curves should be between two x: from `low` to `high`, for a reason that is shown as a tooltip."""

    left: float
    right: float
    low: float
    high: float
    text: str


class Bin(NamedTuple):
    """Neighbouring points drawn as one: their mean x, mean y, lowest and highest y."""

    x: float
    y: float
    low: float
    high: float


def merged(points: Sequence[tuple[float, float]]) -> list[Bin]:
    """The points of each x as one."""
    found = []
    for x, together in groupby(points, key=lambda point: point[0]):
        ys = [y for _, y in together]
        found.append(Bin(x, sum(ys) / len(ys), min(ys), max(ys)))
    return found


def downsample(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[Bin]:
    """Merge neighbouring points into at most `limit` bins of equal size, up to one x; short series are kept."""
    singles = merged(points)
    num_bins = min(limit, len(singles))
    bins = []
    for i in range(num_bins):
        part = singles[i * len(singles) // num_bins : (i + 1) * len(singles) // num_bins]
        x, y = (sum(column) / len(part) for column in ([b.x for b in part], [b.y for b in part]))
        bins.append(Bin(x, y, min(b.low for b in part), max(b.high for b in part)))
    return bins


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in equal steps (1, 2, 2.5, 5 times a power of ten), from `low` or below to `high` or above."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):  # the same, but for rounding
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as text: whole and large ones with commas for thousands, others with four digits."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def swatch(style: int) -> str:
    """A short line in the colour and dashes of a series, shown before its name."""
    line = f'<line x1="1" y1="5" x2="21" y2="5" {_dash(style)}/>'
    return f'<svg class="swatch {colour(style)}" viewBox="0 0 22 10" aria-hidden="true">{line}</svg>'


def colour(style: int) -> str:
    """The CSS class of a series' colour. Colours repeat after `NUM_COLOURS` series, with other dashes."""
    return f"c{style % NUM_COLOURS}"


def plot(
    title: str, series: Sequence[Series], unit: str = "", *, zero: bool = False, wide: bool = False,
    boxes: Sequence[Box] = (),
) -> str:  # fmt: skip
    """One figure with axes, curves, tooltips and a legend with the last values; empty where no series has points.

    x is the optimizer step, and its axis begins at 0. A long curve is drawn as the means of its bins, with a light band
    from the lowest to the highest value, cut off at the axes, unless these are of several runs at one x. `zero`: the y
    axis begins at 0. `wide`: the shape for a whole row instead of a part of one. `boxes`: where curves should be.
    """
    limit = MAX_POINTS if wide else MAX_POINTS_SMALL
    curves = [(one, downsample(one.points, limit)) for one in series if one.points]
    if not curves:
        return ""
    width, height = (900, 340) if wide else (460, 220)
    ys = [y for _, bins in curves for b in bins for y in ((b.low, b.y, b.high) if len(bins) < limit else (b.y,))]
    last = max(1.0, *(bins[-1].x for _, bins in curves))
    boxes = [box for box in boxes if box.left < last]
    ys += [0.0] * zero + [y for box in boxes for y in (box.low, box.high)]
    y_ticks = ticks(min(ys), max(ys))
    frame = _Frame(last, y_ticks[0], y_ticks[-1], width - LEFT - RIGHT, height - TOP - BOTTOM)
    bands = "".join(_box(box, frame) for box in boxes) + "".join(_band(one, bins, frame) for one, bins in curves)
    inner = f'<svg width="{frame.width}" height="{frame.height}">{bands}</svg>'  # an inner svg clips, and needs no id
    inner += "".join(_line(one, bins, frame) for one, bins in curves)
    inner += _tooltips(curves, frame, unit) + "".join(_marks(one, frame) for one, _ in curves)
    return (
        f'<figure class="plot{" wide" if wide else ""}"><figcaption>{escape(title)}'
        f"{f' <small>{escape(unit)}</small>' if unit else ''}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{_axes(frame, y_ticks, 8 if wide else 4)}"
        f'<g transform="translate({LEFT} {TOP})">{inner}</g></svg>'
        f"{_legend([one for one, _ in curves])}</figure>"
    )


class _Frame(NamedTuple):
    """The range of the data (x from 0) and its size in the SVG, where (0, 0) is the upper left corner of the axes."""

    x1: float
    y0: float
    y1: float
    width: int
    height: int

    def x(self, value: float) -> float:
        return round(value / self.x1 * self.width, 1)

    def y(self, value: float) -> float:
        return round((self.y1 - value) / (self.y1 - self.y0) * self.height, 1)


def _dash(style: int) -> str:
    dash = DASHES[style // NUM_COLOURS % len(DASHES)]
    return f'stroke-dasharray="{dash}" ' if dash else ""


def _axes(frame: _Frame, y_ticks: Sequence[float], num_x: int) -> str:
    bottom, right = TOP + frame.height, LEFT + frame.width
    parts = []
    for value in y_ticks:
        y = TOP + frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" dy=".35em" text-anchor="end">{_tick_label(value)}</text>')
    for value in ticks(0, frame.x1, num_x):
        if value <= frame.x1:
            x = LEFT + frame.x(value)
            anchor = "end" if x > right - 20 else "middle"
            parts.append(f'<line class="tick" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 4}"/>')
            parts.append(f'<text x="{x}" y="{bottom + 7}" dy=".8em" text-anchor="{anchor}">{_tick_label(value)}</text>')
    parts.append(f'<line class="tick" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    return "".join(parts)


def _tick_label(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.12g}k"
    if value and abs(value) < 0.001:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}"


def _band(one: Series, bins: Sequence[Bin], frame: _Frame) -> str:
    if all(b.low == b.high for b in bins):
        return ""
    outline = [(b.x, b.high) for b in bins] + [(b.x, b.low) for b in reversed(bins)]
    return f'<polygon class="band {colour(one.style)}" points="{_points(outline, frame)}"/>'


def _box(box: Box, frame: _Frame) -> str:
    left, right, top, bottom = frame.x(box.left), frame.x(box.right), frame.y(box.high), frame.y(box.low)
    shape = f'x="{left}" y="{top}" width="{round(right - left, 1)}" height="{round(bottom - top, 1)}"'
    return f'<rect class="box" {shape}><title>{escape(box.text)}</title></rect>'


def _line(one: Series, bins: Sequence[Bin], frame: _Frame) -> str:
    line = f'<polyline {_dash(one.style)}points="{_points([(b.x, b.y) for b in bins], frame)}"/>'
    few = bins if len(bins) <= MAX_DOTS else []
    dots = "".join(f'<circle cx="{frame.x(b.x)}" cy="{frame.y(b.y)}" r="3"/>' for b in few)
    return f'<g class="{colour(one.style)}">{line}{dots}</g>'


def _points(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    return " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in points)


def _marks(one: Series, frame: _Frame) -> str:
    parts = []
    for mark in one.marks:
        if 0 <= mark <= frame.x1:
            x, text = frame.x(mark), escape(f"{one.name}: resumed at step {number(mark)}")
            line = f'<line x1="{x}" y1="0" x2="{x}" y2="{frame.height}"/>'
            parts.append(f'<g class="mark {colour(one.style)}"><title>{text}</title>{line}</g>')
    return "".join(parts)


def _tooltips(curves: Sequence[tuple[Series, Sequence[Bin]]], frame: _Frame, unit: str) -> str:
    """Invisible columns over the plot, each with the values of every curve in its middle."""
    centres = sorted({b.x for _, bins in curves for b in bins})
    centres = centres[:: math.ceil(len(centres) / MAX_TOOLTIPS)]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(centres)), frame.x1]
    parts = []
    for centre, (left, right) in zip(centres, pairwise(edges), strict=True):
        lines = [f"step {number(round(centre))}"]
        for one, bins in curves:
            after = bisect_left(bins, (centre,))
            nearest = min(bins[max(0, after - 1) : after + 1], key=lambda b: abs(b.x - centre))
            if left <= nearest.x <= right:
                lines.append(f"{one.name}: {number(nearest.y)} {unit}".rstrip())
        x, width = frame.x(left), round(frame.x(right) - frame.x(left), 1)
        text = escape("\n".join(lines))
        parts.append(f'<rect class="hover" x="{x}" y="0" width="{width}" height="100%"><title>{text}</title></rect>')
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    items = []
    for one in series:
        name = escape(one.name)
        items.append(
            f'<li>{swatch(one.style)}<span title="{name}">{name}</span> <b>{number(merged(one.points)[-1].y)}</b></li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'
