"""Curves for people: named series of numbers become one inline SVG in an HTML figure, and the style that shows it.

Promises: pure functions from numbers to text, well-formed as XML and as HTML, every name escaped, no scripts, nothing
loaded from anywhere; colours are CSS classes, so that one text serves light and dark.
Must not know: runs, files, what a loss is. Imports nothing but the standard library.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

NUM_COLOURS = 7
DASHES = ("", "7 3", "2 3")
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 10, 30
MAX_POINTS = 500
MAX_POINTS_SMALL = 120
MAX_TOOLTIPS = 100
MAX_DOTS = 30

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --card: #fff; --ink: #1c1e21; --soft: #666b73; --line: #e4e4df; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --card: #1d2024; --ink: #e8e8e6; --soft: #9aa0a8; --line: #32363c; }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1160px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem } p { margin: .3rem 0; max-width: 75ch } .soft { color: var(--soft) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .87em }
th, td { padding: .45em .8em .45em 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line) }
th { font-weight: 500; color: var(--soft) } .num { text-align: right; font-variant-numeric: tabular-nums }
td.num, .nowrap { white-space: nowrap } th { vertical-align: bottom } td:first-child { font-weight: 600 }
td:last-child { min-width: 8.5em }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 1.4rem }
.grid .wide { grid-column: 1 / -1 } .grid + p { margin: .6rem 0 1.4rem }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem }
.pair h3 { margin: 0 } .pair .gain { font-size: 1.9rem; font-weight: 650; line-height: 1.2; margin: .1em 0 .3em }
.pair .gain small { font-size: .5em; font-weight: 400; color: var(--soft) } .pair p { font-size: .85em }
.bar { display: grid; grid-template-columns: 1fr auto; gap: 0 .8em; font-size: .9em; margin: .35em 0 }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap } .bar i { grid-column: 1 / -1; height: 7px }
.bar i { background: currentColor; border-radius: 3px; min-width: 2px } .bar span, .bar b { color: var(--ink) }
.gallery { margin: 0; min-width: 0 } .gallery img { display: block; max-width: 100%; border-radius: 6px }
.gallery figcaption { font-size: .85em; color: var(--soft) }
.earlier { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: .8rem }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem }
details + details { margin-top: .6rem }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere } summary small { font-weight: 400 }
pre { overflow-x: auto; font: 12.5px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
:root { --c0: #0072b2; --c1: #d55e00; --c2: #008f68; --c3: #b8559a; --c4: #c98a00; --c5: #3fa0dc; --c6: #6d6d6d; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #4aa8e8; --c1: #ff8445; --c2: #2fc79c; --c3: #e493c4; --c4: #f0b93a; --c5: #a5dcfa; --c6: #b0b0b0; }
}
.c0 { color: var(--c0) } .c1 { color: var(--c1) } .c2 { color: var(--c2) } .c3 { color: var(--c3) }
.c4 { color: var(--c4) } .c5 { color: var(--c5) } .c6 { color: var(--c6) }
.plot { margin: 0; min-width: 0 }
.plot figcaption { font-weight: 600 } .plot figcaption small { font-weight: 400; color: var(--soft) }
.chart { display: block; width: 100%; height: auto; overflow: visible }
.chart text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums }
.wide .chart text { font-size: 11.5px }
.chart polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round }
.chart circle { fill: currentColor }
.chart .band { fill: currentColor; opacity: .16 }
.chart .grid { stroke: var(--line) } .chart .tick { stroke: var(--soft) }
.chart .mark line { stroke: currentColor; stroke-dasharray: 1.5 3; stroke-width: 1.5 }
.chart .hover { fill: transparent } .chart .hover:hover { fill: var(--soft); fill-opacity: .15 }
.swatch { width: 22px; height: 10px; flex: none } .swatch line { stroke: currentColor; stroke-width: 3 }
.legend { display: flex; flex-wrap: wrap; gap: .1em 1.2em; margin: .2em 0 0; padding: 0; font-size: .85em }
.legend li { display: flex; align-items: center; gap: .4em; min-width: 0; max-width: 100% }
.legend span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.legend b { font-weight: 600; font-variant-numeric: tabular-nums }
@media (max-width: 640px) {
  .chart text { font-size: 15px } .wide .chart text { font-size: 24px } .wide .chart polyline { stroke-width: 3.4 }
}
"""
"""The look of a whole page, in light and dark: plots, tables, cards and galleries share inks and colours."""


@dataclass(frozen=True)
class Series:
    """A named curve. `points` are finite (x, y) with x ascending; `marks` are the x of vertical ticks.

    `style` numbers the curve on the whole page: it decides colour and dashes and stays the same from plot to plot.
    """

    name: str
    style: int
    points: Sequence[tuple[float, float]]
    marks: Sequence[float] = ()


class Bin(NamedTuple):
    """Neighbouring points in one: mean x, mean y, lowest and highest y."""

    x: float
    y: float
    low: float
    high: float


def downsample(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[Bin]:
    """At most `limit` bins of neighbouring points, equally many in each up to one; short series stay as they are."""
    num_bins = min(limit, len(points))
    bins = []
    for i in range(num_bins):
        part = points[i * len(points) // num_bins : (i + 1) * len(points) // num_bins]
        ys = [y for _, y in part]
        bins.append(Bin(sum(x for x, _ in part) / len(part), sum(ys) / len(part), min(ys), max(ys)))
    return bins


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in equal steps (1, 2, 2.5, 5 times a power of ten), from `low` or below to `high` or above."""
    if low == high:
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as people write it: whole ones with thousands, others with four digits."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def swatch(style: int) -> str:
    """A short stroke in the colour and dashes of a series, to stand before its name."""
    line = f'<line x1="1" y1="5" x2="21" y2="5" {_dash(style)}/>'
    return f'<svg class="swatch {colour(style)}" viewBox="0 0 22 10" aria-hidden="true">{line}</svg>'


def colour(style: int) -> str:
    """The CSS class of a series' colour; after `NUM_COLOURS` they return with other dashes."""
    return f"c{style % NUM_COLOURS}"


def plot(title: str, series: Sequence[Series], *, unit: str = "", zero: bool = False, wide: bool = False) -> str:
    """One figure with axes, curves, a legend with the last values and tooltips; empty where nothing is to show.

    x is the optimizer step, 0 or more, and the axis begins at 0. A long curve is drawn as the means of its bins, with a
    light band from lowest to highest that ends at the axes. `zero` makes the y axis begin at 0. `wide` is the shape for
    a full row instead of half of one.
    """
    limit = MAX_POINTS if wide else MAX_POINTS_SMALL
    curves = [(one, downsample(one.points, limit)) for one in series if one.points]
    if not curves:
        return ""
    width, height = (900, 340) if wide else (460, 220)
    ys = [b.y for _, bins in curves for b in bins] + [0.0] * zero
    y_ticks = ticks(min(ys), max(ys))
    last = max(1.0, *(bins[-1].x for _, bins in curves))
    frame = _Frame(last, y_ticks[0], y_ticks[-1], width - LEFT - RIGHT, height - TOP - BOTTOM)
    bands = "".join(_band(one, bins, frame) for one, bins in curves)
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
    """The data's box, x from 0, and its size on paper; (0, 0) on paper is the upper left corner inside the axes."""

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
    """Invisible columns over the plot, each with what every curve says in its middle."""
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
            f'<li>{swatch(one.style)}<span title="{name}">{name}</span> <b>{number(one.points[-1][1])}</b></li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'
