"""Activation outliers: how far the largest channel of each layer's input is above the median one, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ptql.report.axes import channel_ticks, index_ticks, log_axis
from ptql.report.html import Markup, join, tag
from ptql.report.numbers import figure
from ptql.report.plot import area, center, chart, dot, hint, legend, line, outline
from ptql.report.ranges import Peaks, largest_of_bins, log_limits, outlier_ratio
from ptql.report.run_files import Block, RunFiles
from ptql.report.tables import absent, titled

HEADING, NAME = "Outliers in activations", "outliers"
HEIGHT = 130
BINS = 180  # of a profile: about two pixels each

WORDS = (
    "The largest |input| of each channel over the calibration tokens, relative to the median channel: 1 would be "
    "even, large values make rounding per token coarse. Before: the full-precision block. After: the quantised block "
    "on its own inputs, smoothed and not yet rounded. Layers that share an input stand under the first of them."
)


@dataclass
class Site:
    """The ratios of one input in every block, and the profile of the block where it is largest after."""

    before: list[float]
    after: list[float]
    worst: tuple[float, Block, Peaks | None, Peaks | None] | None = None


def outliers(run: RunFiles) -> Markup:
    """The section with two charts a site: the ratio in each block, and the channels of the worst block."""
    sites = read_sites(run)
    if not sites:
        return absent(HEADING, NAME, "This run did not note the ranges of activations.")
    key = legend(("before", "before"), ("after", "after"))
    cards = [_card(name, site, run) for name, site in sites.items()]
    return titled(HEADING, NAME, tag("p", WORDS), key, tag("div", cards, class_="cards"))


def read_sites(run: RunFiles) -> dict[str, Site]:
    """Sites by the first layer that reads them; one profile of each is kept, not those of all blocks."""
    sites: dict[str, Site] = {}
    for place, block in enumerate(run.blocks):
        for name, (before, after) in run.ranges(block).items():
            count = len(run.blocks)
            site = sites.setdefault(name, Site([math.nan] * count, [math.nan] * count))
            if before is not None:
                site.before[place] = outlier_ratio(before)
            if after is not None:
                site.after[place] = outlier_ratio(after)
            ratio = site.before[place] if math.isnan(site.after[place]) else site.after[place]
            if not math.isnan(ratio) and (site.worst is None or ratio > site.worst[0]):
                site.worst = (ratio, block, before, after)
    return sites


def _card(name: str, site: Site, run: RunFiles) -> Markup:
    profile = None if site.worst is None else _profile(name, *site.worst[1:])
    return tag("figure", tag("figcaption", "Input of ", tag("code", name)), _ratios(name, site, run.blocks), profile)


def _ratios(name: str, site: Site, blocks: list[Block]) -> Markup:
    y, count = log_axis([*site.before, *site.after, 1.0]), len(blocks)
    marks = [line(site.before, y, "before", HEIGHT), line(site.after, y, "after", HEIGHT)]
    for place, block in enumerate(blocks):
        a, b, at = site.before[place], site.after[place], center(place, count)
        if count <= 40:
            marks += [dot(at, v, y, kind, 2.2, HEIGHT) for v, kind in ((a, "before"), (b, "after")) if math.isfinite(v)]
        words = f"block {block.index}: {figure(a, 3)} before, {figure(b, 3)} after"
        marks.append(hint(at, 1 / count, words, HEIGHT))
    ticks = [(center(i, count), str(blocks[i].index)) for i in index_ticks(count, 6)]
    label = f"Outlier ratio of the input of {name}, by block"
    return chart(marks, y, ticks, unit="largest ∕ median channel", x_title="block", label=label, height=HEIGHT)


def _profile(name: str, block: Block, before: Peaks | None, after: Peaks | None) -> Markup:
    bins = [largest_of_bins(peaks, BINS) if peaks is not None else [] for peaks in (before, after)]
    y, channels = log_axis(log_limits(*bins)), len(before if before is not None else after if after is not None else [])
    marks = join(area(bins[0], y, "before", HEIGHT), outline(bins[1], y, "after", HEIGHT) if bins[1] else None)
    ticks = [(v / max(channels, 1), str(v)) for v in channel_ticks(channels)]
    unit = f"largest |input| in block {block.index}, the worst"
    label = f"Largest input of each channel of {name} in block {block.index}"
    return chart([marks], y, ticks, unit=unit, x_title="channel", label=label, height=HEIGHT)
