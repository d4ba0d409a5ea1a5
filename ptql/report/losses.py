"""Loss of each block before and after learning."""

from __future__ import annotations

import math

from ptql.report.axes import index_ticks, log_axis
from ptql.report.html import Markup, tag
from ptql.report.numbers import duration, figure, gibibytes, plural
from ptql.report.plot import bar, center, chart, dot, hint, legend
from ptql.report.run_files import Block, RunFiles
from ptql.report.tables import DASH, absent, table, titled

HEADING, NAME = "Loss per block", "loss"
FEW = 12  # blocks whose table is open


def losses(run: RunFiles) -> Markup:
    """The section with the chart and the table of blocks."""
    if not run.blocks:
        return absent(HEADING, NAME, "The ledger names no finished block.")
    words = (
        "The objective of the encoded block on the calibration data, with the initial values and with those that were "
        "learned. Blocks count from 0, as in the names of the model's tensors. " + _takeaway(run.blocks)
    )
    rows = [_row(block) for block in run.blocks]
    columns = ["Block", "Start", "End", "Change", "MSE", "Best epoch", "Skipped", "Time", "GPU GiB", "Host GiB", ""]
    details = tag(
        "details",
        tag("summary", f"Figures of {plural(len(rows), 'block')}"),
        table(columns, rows, "Loss, time and memory of each block", 0),
        class_="figures",
        open=len(rows) <= FEW,
    )
    return titled(HEADING, NAME, tag("p", words), loss_chart(run.blocks), details)


def loss_chart(blocks: list[Block]) -> Markup:
    """Start and end of each block on a logarithmic axis, joined by a bar."""
    start, end = ([block.number(key) for block in blocks] for key in ("loss_start", "loss"))
    y, count = log_axis([*start, *end]), len(blocks)
    radius = 3.5 if count <= 40 else 2.4
    marks: list[Markup] = []
    for place, block in enumerate(blocks):
        at, a, b = center(place, count), start[place], end[place]
        if math.isfinite(a) and math.isfinite(b):
            marks.append(bar(at, 0.0016, min(a, b), max(a, b), y, "stem"))
        if math.isfinite(a):
            marks.append(dot(at, a, y, "before", radius))
        marks.append(dot(at, b, y, "fell" if block.summary.get("fell_back") is True else "after", radius))
        marks.append(hint(at, 1 / count, f"block {block.index}: {figure(a)} → {figure(b)}"))
    entries = [("before", "start"), ("after", "end")]
    if any(block.summary.get("fell_back") is True for block in blocks):
        entries.append(("fell", "learning did not help: start kept"))
    if not all(map(math.isfinite, end)):
        entries.append(("cross", "not finite"))
    ticks = [(center(i, count), str(blocks[i].index)) for i in index_ticks(count)]
    label = f"Loss of {plural(count, 'block')} before and after learning"
    unit = "loss, logarithmic" if y.log else "loss"
    return tag("figure", legend(*entries), chart(marks, y, ticks, unit=unit, x_title="block", label=label))


def _takeaway(blocks: list[Block]) -> str:
    pairs = [(b.number("loss_start"), b.number("loss")) for b in blocks]
    known = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    lower = sum(b < a for a, b in known)
    if not known:
        return ""
    if not lower:
        return "No block has a lower loss in the end: nothing was learned, or learning did not help."
    shares = sorted(1 - b / a for a, b in known if a > 0)
    middle = shares[len(shares) // 2] if shares else 0.0
    typical = f", in the median block by {figure(100 * middle, 2)} %" if middle > 0 else ""
    return f"Learning lowered it in {lower} of {plural(len(blocks), 'block')}{typical}."


def _row(block: Block) -> list[object]:
    a, b = block.number("loss_start"), block.number("loss")
    change = _change(b / a - 1) if math.isfinite(b) and a > 0 else DASH
    fell = tag("span", "start kept", class_="flag") if block.summary.get("fell_back") is True else ""
    return [
        block.index,
        figure(a),
        tag("span", figure(b), class_=None if math.isfinite(b) else "flag"),
        change,
        figure(block.number("mse")),
        _whole(block, "best_epoch"),
        _whole(block, "skipped_steps"),
        duration(block.number("seconds")),
        *(_gib(block.number(f"peak_{kind}_bytes")) for kind in ("gpu", "host")),
        fell,
    ]


def _change(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−") if share else "0.0 %"


def _whole(block: Block, key: str) -> str:
    value = block.number(key)
    return f"{value:.0f}" if math.isfinite(value) else DASH


def _gib(count: float) -> str:
    return f"{gibibytes(count):.2f}" if math.isfinite(count) else DASH
