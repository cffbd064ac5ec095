"""The charts of a report."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcore.reporting.charts import POINTS, Line, Panel, calibration_svg, nice_ticks, panels_svg, thinned


def draw(*lines, width=300):
    """Return the parsed chart of two panels: `lines` are the points of the first one's series."""
    series = [Line(number, points) for number, points in enumerate(lines)]
    return ElementTree.fromstring(
        panels_svg([Panel("t & t", series), Panel("b", [Line(0, [(5, 1)], dots=True)])], "x", 'a "b" <c>', width=width)
    )


def texts(root):
    return [text.text for text in root.iter("text")]


def paths(root, kind="line"):
    return [path.get("d") for path in root.iter("path") if kind in path.get("class").split()]


def test_panels_share_whole_numbers_as_iterations():
    root = draw([(1, 0.5), (2, 0.1), (3, 0.2)], [(0, 0.3)])
    assert {"t & t", "b", "x", "0", "2", "4", "6"} <= set(texts(root))
    assert root.get("aria-label") == 'a "b" <c>'
    first, second, below = paths(root)
    assert (first.count("L"), second.count("L"), below.count("L")) == (2, 0, 0)
    x, y = zip(*(point.split() for point in first[1:].split("L")), strict=True)
    assert list(map(float, x)) == sorted(map(float, x))
    assert float(y[0]) < float(y[2]) < float(y[1]), "y points down in an SVG"
    assert [dot.get("class") for dot in root.iter("circle")] == ["dot s1", "dot s0"]  # each a line of one point


@pytest.mark.parametrize("points", [[], [(0, 0.0)], [(3, -2.0)], [(0, math.nan)], [(0, 1.0), (1, math.inf), (2, 3.0)]])
def test_a_line_of_almost_nothing(points):
    finite = sum(math.isfinite(y) for _, y in points)
    root = draw(points)
    assert len(paths(root)) == 1 + bool(finite)
    assert paths(root)[0].count("L") == max(finite - 1, 0)
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")


def test_long_lines_are_means_of_neighbors():
    points = [(i, float(i % 2)) for i in range(10 * POINTS)]
    found = thinned(points)
    assert len(found) == POINTS
    assert {y for _, y in found} == {0.5}
    assert found[0][0] == 4.5


def test_calibration_leaves_out_empty_bins():
    root = ElementTree.fromstring(calibration_svg([0, 10, 30], [None, 0.5, 0.9], [None, 0.5, 1.0], "label"))
    (line,) = paths(root)
    assert line.count("L") == 1
    heights = [float(column.get("height")) for column in root.iter("rect")]
    assert heights[0] == 0
    assert heights[2] == pytest.approx(3 * heights[1], abs=0.2)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(3, 10))
def test_ticks_are_few_ordered_and_cover_the_values(values, count):
    low, high = min(values), max(values)
    ticks = nice_ticks(values, count)
    slack = (ticks[-1] - ticks[0]) * 1e-6
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= count + 2
    assert ticks[0] - slack <= low
    assert high <= ticks[-1] + slack


def test_a_single_point_is_seen():
    """As the loss of a run whose log has one entry: a path of one point draws nothing."""
    svg = panels_svg([Panel("loss", [Line(0, [(40, 2.98)])])], "iteration", "loss", width=400)
    assert svg.count("<circle") == 1
    assert panels_svg([Panel("loss", [Line(0, [(4, 3), (5, 2)])])], "", "", width=400).count("<circle") == 0
