"""How far each matrix is from its quantised form: blocks by layers, as a heat map."""

from __future__ import annotations

import math

from ptql.report.axes import index_ticks
from ptql.report.html import Markup, join, tag
from ptql.report.numbers import figure
from ptql.report.plot import center, percent
from ptql.report.run_files import RunFiles, finite
from ptql.report.tables import absent, titled

HEADING, NAME = "Weight error per layer", "layers"
ROW = 24  # pixels
SHADES = 24  # of the legend
FAINTEST = 0.07  # share of the full colour that the least error has
WIDE = 10.0  # largest over smallest from where shades follow the logarithm


def weight_error(run: RunFiles) -> Markup:
    """The section with the heat map."""
    names = run.layer_names
    if not names:
        return absent(HEADING, NAME, "This run did not note errors by layer.")
    cells = [[block.layers.get(name, math.nan) for block in run.blocks] for name in names]
    shade = Shade([value for row in cells for value in row])
    known = [(v, name, b.index) for b in run.blocks for name, v in b.layers.items() if math.isfinite(v)]
    words = "Squared error of the quantised weights over the squared weights, ‖W − Ŵ‖² ∕ ‖W‖², after folding. "
    if known:
        error, name, index = max(known)
        words += f"Largest: {name} of block {index}, {figure(error, 3)}."
    drawn = heat_map(run, names, cells, shade, "Weight error")
    return titled(HEADING, NAME, tag("p", words), tag("figure", shade.legend(), drawn))


class Shade:
    """How strong the colour of a value is, 0 to 1.

    Args:
        values: All that are to be shown.
    """

    def __init__(self, values: list[float]) -> None:
        known = [v for v in finite(values) if v >= 0]
        positive = [v for v in known if v > 0]
        self.low, self.high = min(known, default=0.0), max(known, default=1.0)
        self.log = bool(positive) and self.high / min(positive) > WIDE
        if self.log:
            self.low = min(positive)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 1.0
        return FAINTEST + (1 - FAINTEST) * min(max(share, 0.0), 1.0)

    def legend(self) -> Markup:
        """The range of shades with its ends."""
        steps = [FAINTEST + (1 - FAINTEST) * i / (SHADES - 1) for i in range(SHADES)]
        bars = [
            tag("rect", x=percent(i / SHADES), width=percent(1 / SHADES), height=12, fill_opacity=f"{s:.2f}")
            for i, s in enumerate(steps)
        ]
        scale = tag("svg", bars, width=160, height=12, class_="heat", role="img", aria_label="colour scale")
        kind = "logarithmic" if self.log else "linear"
        return tag("p", figure(self.low, 2), " ", scale, " ", figure(self.high, 2), f"  ({kind})", class_="scale")


def heat_map(
    run: RunFiles, names: list[str], cells: list[list[float]], shade: Shade, what: str, digits: int = 3
) -> Markup:
    """A cell for each layer and block, in the colour of its value.

    Args:
        run: Has the blocks.
        names: Of the layers.
        cells: A row for each name, a value for each block; nan where it is not known.
        shade: Of values.
        what: They are, for those who do not see it.
        digits: Of a value.
    """
    count, height = len(run.blocks), ROW * len(names)
    rows = []
    for place, (name, row) in enumerate(zip(names, cells, strict=True)):
        y = float(place * ROW)
        marks = [
            _cell(value, f"{name}, block {block.index}: {figure(value, digits)}", column / count, 1 / count, y, shade)
            for column, (value, block) in enumerate(zip(row, run.blocks, strict=True))
        ]
        rows.append(join(tag("text", short(name, names), x=-8, y=y + ROW / 2, dy=".32em", class_="end"), marks))
    ticks = [
        tag("text", run.blocks[i].index, x=percent(center(i, count)), y=height + 17, class_="mid")
        for i in index_ticks(count)
    ]
    title = tag("text", "block", x="50%", y=height + 36, class_="mid name")
    label = f"{what} of {len(names)} layers in {count} blocks"
    tight = " tight" if count > 40 else ""
    drawing = tag(
        "svg", rows, ticks, title, width="100%", height=height + 42, class_="heat" + tight, role="img", aria_label=label
    )
    return tag("div", tag("div", drawing, class_="plot wide"), class_="chart")


def _cell(value: float, words: str, x: float, width: float, y: float, shade: Shade) -> Markup:
    known = math.isfinite(value)
    return tag(
        "rect",
        tag("title", words),
        x=percent(x),
        width=percent(width),
        y=y + 1,
        height=ROW - 2,
        fill_opacity=f"{shade(value):.3f}" if known else None,
        class_=None if known else "none",
    )


def short(name: str, names: list[str]) -> str:
    """A layer's name without its module where no other layer ends the same way; cut if it is very long."""
    last = name.rpartition(".")[2]
    text = last if sum(other.rpartition(".")[2] == last for other in names) == 1 else name
    return text if len(text) <= 14 else f"…{text[-13:]}"
