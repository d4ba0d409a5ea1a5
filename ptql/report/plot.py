"""Charts in SVG whose width is that of the page: places along x are shares, heights are pixels, text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ptql.report.axes import Axis
from ptql.report.html import Markup, join, tag

HEIGHT = 190


def chart(
    marks: Sequence[object],
    y: Axis,
    x_ticks: Sequence[tuple[float, str]],
    *,
    unit: str,
    x_title: str,
    label: str,
    height: int = HEIGHT,
) -> Markup:
    """A chart with its axes.

    Args:
        marks: What is drawn, made with the functions below.
        y: The axis of values.
        x_ticks: Place (0 to 1) and text.
        unit: What the values are; stands above the axis.
        x_title: Stands below the axis.
        label: The chart in words, for those who do not see it.
        height: Of the drawing without labels, pixels.
    """
    grid = [
        join(
            tag("line", x1=0, x2="100%", y1=_px(at), y2=_px(at), class_="grid"),
            tag("text", text, x=-8, y=_px(at), dy=".32em", class_="end"),
        )
        for at, text in ((height * (1 - y.at(value)), text) for value, text in y.ticks)
    ]
    below = [tag("text", text, x=percent(at), y=height + 17, class_="mid") for at, text in x_ticks]
    base = tag("line", x1=0, x2="100%", y1=height, y2=height, class_="base")
    title = tag("text", x_title, x="50%", y=height + 36, class_="mid name")
    drawing = tag(
        "svg", grid, base, marks, below, title, width="100%", height=height + 42, role="img", aria_label=label
    )
    return tag("div", tag("p", unit, class_="unit"), tag("div", drawing, class_="plot"), class_="chart")


def legend(*entries: tuple[str, str]) -> Markup:
    """What the marks mean: (class of the mark, words)."""
    return tag("ul", [tag("li", tag("i", class_=name), words) for name, words in entries], class_="legend")


def line(values: Sequence[float], y: Axis, name: str, height: int = HEIGHT) -> Markup:
    """A line through values that are evenly spaced over the width; it is broken where one is not finite."""
    steps, pen = [], "M"
    for index, value in enumerate(values):
        if math.isfinite(value):
            steps.append(f"{pen}{1000 * center(index, len(values)):.4g} {_px(height * (1 - y.at(value)))}")
            pen = "L"
        else:
            pen = "M"
    return stretched(tag("path", d="".join(steps), class_=f"line {name}"), height)


def area(values: Sequence[float], y: Axis, name: str, height: int = HEIGHT) -> Markup:
    """Bars without gaps between them, as one shape."""
    width = 1000 / max(len(values), 1)
    tops = [height * (1 - y.at(v)) if math.isfinite(v) else height for v in values]
    path = "".join(f"V{_px(top)}H{(i + 1) * width:.4g}" for i, top in enumerate(tops))
    return stretched(tag("path", d=f"M0 {height}{path}V{height}Z", class_=f"area {name}"), height)


def outline(values: Sequence[float], y: Axis, name: str, height: int = HEIGHT) -> Markup:
    """The upper edge of `area`."""
    width = 1000 / max(len(values), 1)
    tops = [_px(height * (1 - y.at(v)) if math.isfinite(v) else height) for v in values]
    path = "".join(f"V{top}H{(i + 1) * width:.4g}" for i, top in enumerate(tops))
    return stretched(tag("path", d=f"M0 {tops[0] if tops else height}{path}", class_=f"line {name}"), height)


def dot(at: float, value: float, y: Axis, name: str, radius: float = 3.0, height: int = HEIGHT) -> Markup:
    """A dot; a value that is not finite is a cross at the upper edge."""
    if math.isfinite(value):
        return tag("circle", cx=percent(at), cy=_px(height * (1 - y.at(value))), r=radius, class_=name)
    return tag("text", "×", x=percent(at), y=10, class_="mid cross")


def bar(at: float, width: float, low: float, high: float, y: Axis, name: str, height: int = HEIGHT) -> Markup:
    """A bar around the place `at` between two values."""
    top, bottom = (height * (1 - y.at(v)) for v in (high, low))
    return tag(
        "rect",
        x=percent(at - width / 2),
        width=percent(width),
        y=_px(top),
        height=_px(max(bottom - top, 0)),
        class_=name,
    )


def hint(at: float, width: float, text: str, height: int = HEIGHT) -> Markup:
    """An invisible column that shows `text` under the pointer."""
    return tag(
        "rect",
        tag("title", text),
        x=percent(at - width / 2),
        width=percent(width),
        y=0,
        height=height,
        class_="hint",
    )


def stretched(shape: Markup, height: int) -> Markup:
    """A shape in a space 1000 wide, drawn out to the chart's width."""
    box = f"0 0 1000 {height}"
    return tag("svg", shape, width="100%", height=height, viewBox=box, preserveAspectRatio="none", class_="inner")


def center(index: int, count: int) -> float:
    """The place of one of `count` columns."""
    return (index + 0.5) / count


def percent(share: float) -> str:
    return f"{100 * share:.5g}%"


def _px(value: float | int) -> str:
    return f"{value:.4g}"
