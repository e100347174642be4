"""Curves as SVG: downsampling, ticks, and what a plot draws."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from mae_dist.monitor import svg

EVIL = '<script>alert("&")</script>'


@pytest.mark.parametrize("num_points", [0, 1, 7, 500, 501, 999, 12_345])
def test_svg_downsample_keeps_count_mean_order_and_extremes(num_points: int) -> None:
    ys = np.random.default_rng(num_points).normal(size=num_points)
    points = list(enumerate(ys.tolist()))
    bins = svg.downsample(points, 500)
    assert len(bins) == min(num_points, 500)
    assert all(a.x < b.x for a, b in pairwise(bins))
    assert all(b.low <= b.y + 1e-12 and b.y <= b.high + 1e-12 for b in bins)
    if num_points <= 500:
        assert [(b.x, b.y) for b in bins] == points
    else:
        assert min(b.low for b in bins) == ys.min()
        assert max(b.high for b in bins) == ys.max()
        sizes = np.diff([i * num_points // 500 for i in range(501)])
        assert np.average([b.y for b in bins], weights=sizes) == pytest.approx(ys.mean())


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.37, 1.02), (0, 1.5e-4), (-3, 12_345), (5, 5), (0, 0), (1e6, 1e6 + 1)]
)
def test_svg_ticks_are_round_and_cover(low: float, high: float) -> None:
    values = svg.ticks(low, high)
    step = values[1] - values[0]
    slack = 1e-6 * step
    assert values[0] <= low + slack
    assert values[-1] >= high - slack
    assert 2 <= len(values) <= 8
    assert np.allclose(np.diff(values), step)
    mantissa = step / 10 ** math.floor(math.log10(step * (1 + 1e-9)))
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_svg_plot_draws_every_point_of_a_short_series_inside_its_axes() -> None:
    points = [(0, 3.0), (10, 1.0), (20, 2.0)]
    figure = ElementTree.fromstring(svg.plot("T", [svg.Series(EVIL, 1, points, marks=[10])], zero=True))
    line = figure.find(".//g[@class='c1']/polyline")
    assert line is not None
    drawn = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    width = 460 - svg.LEFT - svg.RIGHT
    height = 220 - svg.TOP - svg.BOTTOM
    assert [x for x, _ in drawn] == [0, width / 2, width]
    assert [y for _, y in drawn] == pytest.approx([height * (1 - y / 3) for _, y in points], abs=0.1)
    tooltips = [t.text or "" for t in figure.iterfind(".//rect[@class='hover']/title")]
    assert [t.splitlines() for t in tooltips] == [[f"step {x}", f"{EVIL}: {y:g}"] for x, y in points]
    legend = figure.find("ul")
    assert legend is not None
    assert "".join(legend.itertext()) == f"{EVIL} 2"


def test_svg_plot_of_a_long_series_is_small_and_has_a_band() -> None:
    points = [(step, math.sin(step)) for step in range(100_000)]
    text = svg.plot("T", [svg.Series("long", 8, points)], wide=True)
    assert len(text) < 60_000
    assert 'class="band c1"' in text
    assert "stroke-dasharray" in text  # the ninth curve shares a colour with the second, and differs in dashes
    assert text.count('class="hover"') <= svg.MAX_TOOLTIPS
    assert svg.plot("T", [svg.Series("none", 0, [])]) == ""
