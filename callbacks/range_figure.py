"""A picture of activation ranges, channel by channel, before and after; drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ptql.report.axes import Axis, channel_ticks, log_axis
from ptql.report.numbers import figure
from ptql.report.ranges import largest_of_bins, log_limits, outlier_ratio

WIDTH, HEIGHT, COLUMNS = 520, 300, 2  # of a panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 56, 46  # margins of a panel
TITLE = 44  # pixels above the panels
FINER = 2  # drawn so many times larger and then reduced, so that lines are smooth
PAPER, INK, MUTED, RULE = "#ffffff", "#1c2024", "#5c6570", "#e3e6ea"
BEFORE, AFTER = "#aab2bc", "#0b63ce"
Pixels = float | int
ASCII = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def range_figure(ranges: Mapping[str, Float[Tensor, " channels"]], title: str) -> UInt8[np.ndarray, "height width 3"]:
    """A panel for each input: its channels along x, the largest |input| on a logarithmic axis.

    Args:
        ranges: `before.LAYER` and `after.LAYER`.
        title: Stands above the panels.
    """
    ranges = {name: peaks.cpu() for name, peaks in ranges.items()}
    sites = list(dict.fromkeys(name.partition(".")[2] for name in ranges))
    rows = -(-len(sites) // COLUMNS)
    sheet = Sheet(WIDTH * COLUMNS, TITLE + HEIGHT * rows)
    sheet.text(16, 22, f"{title}: largest |input| of each channel", size=17, ink=INK, anchor="lm")
    for place, (name, ink) in enumerate((("before", BEFORE), ("after", AFTER))):
        x = WIDTH * COLUMNS - 200 + 95 * place
        sheet.line([(x, 22), (x + 26, 22)], ink, 4)
        sheet.text(x + 34, 22, name, anchor="lm")
    for place, site in enumerate(sites):
        at = WIDTH * (place % COLUMNS), TITLE + HEIGHT * (place // COLUMNS)
        _panel(sheet, at, site, ranges.get(f"before.{site}"), ranges.get(f"after.{site}"))
    return sheet.pixels()


class Sheet:
    """A drawing surface in pixels, finer inside."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * FINER, height * FINER), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[Pixels, Pixels]], ink: str, width: Pixels = 1) -> None:
        self.draw.line([(x * FINER, y * FINER) for x, y in points], ink, round(width * FINER), joint="curve")

    def text(self, x: Pixels, y: Pixels, text: str, size: int = 14, ink: str = MUTED, anchor: str = "mm") -> None:
        font = ImageFont.load_default(size * FINER)
        self.draw.text((x * FINER, y * FINER), text, ink, font, anchor)

    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        width, height = self.image.width // FINER, self.image.height // FINER
        return np.asarray(self.image.resize((width, height), Image.Resampling.LANCZOS))


def _panel(sheet: Sheet, at: tuple[int, int], site: str, before: Tensor | None, after: Tensor | None) -> None:
    left, top = at[0] + LEFT, at[1] + TOP
    right, bottom = at[0] + WIDTH - RIGHT, at[1] + HEIGHT - BOTTOM
    both = [(peaks, ink) for peaks, ink in ((before, BEFORE), (after, AFTER)) if peaks is not None]
    profiles = [largest_of_bins(peaks, right - left) for peaks, _ in both]
    axis, channels = log_axis(log_limits(*profiles)), max(len(peaks) for peaks, _ in both)
    ratios = " to ".join(figure(outlier_ratio(peaks), 3) for peaks, _ in both)
    sheet.text(left, at[1] + 16, f"input of {site}", size=15, ink=INK, anchor="lm")
    sheet.text(left, at[1] + 36, f"largest / median: {ratios}", anchor="lm")
    for value, label in axis.ticks:
        y = _y(axis, value, top, bottom)
        sheet.line([(left, y), (right, y)], RULE)
        sheet.text(left - 8, y, _plain(label), anchor="rm")
    for channel in channel_ticks(channels):
        x = left + (right - left) * channel / channels
        sheet.line([(x, bottom), (x, bottom + 4)], MUTED)
        sheet.text(x, bottom + 14, str(channel))
    for (_, ink), values in zip(both, profiles, strict=True):
        step = (right - left) / max(len(values), 1)
        points = [(left + (i + side) * step, _y(axis, v, top, bottom)) for i, v in enumerate(values) for side in (0, 1)]
        sheet.line(points, ink, 1.5)
    sheet.line([(left, bottom), (right, bottom)], MUTED)
    sheet.text((left + right) / 2, bottom + 33, "channel")


def _y(axis: Axis, value: float, top: Pixels, bottom: Pixels) -> float:
    """Pixels from above; what is not finite is at the upper edge."""
    share = axis.at(value) if np.isfinite(value) else 1.0
    return bottom - share * (bottom - top)


def _plain(label: str) -> str:
    """Without raised figures, which Pillow's own font does not have: 10⁻⁴ is 1e-4."""
    power = label.removeprefix("10").translate(ASCII)
    return label if label.isascii() else f"1e{power}"
