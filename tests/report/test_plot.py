from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

from ptql.report.axes import linear_axis
from ptql.report.plot import area, bar, center, chart, dot, hint, legend, line, outline, percent

AXIS = linear_axis([0.0, 10.0])


def test_lines_are_broken_where_a_value_is_missing():
    drawn = line([1.0, 2.0, math.nan, 4.0, math.inf, 5.0], AXIS, "after")
    path = re.search(r'd="([^"]+)"', drawn)[1]
    assert [piece.count("L") for piece in path.split("M")[1:]] == [1, 0, 0]


def test_higher_values_are_further_up():
    heights = [float(re.search(r'cy="([^"]+)"', dot(0.5, value, AXIS, "after"))[1]) for value in (0.0, 5.0, 10.0)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == 190


def test_what_is_not_finite_is_a_cross():
    assert "×" in dot(0.5, math.nan, AXIS, "after")
    assert "nan" not in area([1.0, math.nan, math.inf], AXIS, "before") + outline([math.nan], AXIS, "after")


def test_bars_span_their_values():
    drawn = bar(0.5, 0.1, 2.0, 6.0, AXIS, "after")
    y, height = (float(re.search(rf' {name}="([^"]+)"', drawn)[1]) for name in ("y", "height"))
    assert y + height == 190 * (1 - AXIS.at(2.0)) or abs(y + height - 190 * (1 - AXIS.at(2.0))) < 0.2
    assert 'x="45%"' in drawn


def test_a_chart_is_one_well_formed_element_with_axes():
    marks = [line([1.0, 2.0], AXIS, "after"), hint(center(0, 2), 0.5, "first")]
    made = chart(marks, AXIS, [(0.25, "0"), (0.75, "1")], unit="ms", x_title="block", label="Times")
    root = ET.fromstring(made)
    texts = [element.text for element in root.iter("text")]
    assert [*(label for _, label in AXIS.ticks), "0", "1", "block"] == texts
    assert root.find("p").text == "ms"
    assert root.find("div/svg").get("aria-label") == "Times"
    assert [element.text for element in root.iter("title")] == ["first"]


def test_small_parts():
    assert percent(1 / 3) == "33.333%"
    assert center(0, 4) == 0.125
    assert legend(("after", "a<b")) == '<ul class="legend"><li><i class="after"></i>a&lt;b</li></ul>'
