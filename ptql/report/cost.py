"""Time and memory of each block."""

from __future__ import annotations

import math

from ptql.report.axes import index_ticks, linear_axis
from ptql.report.html import Markup, tag
from ptql.report.numbers import duration, gibibytes, plural, real
from ptql.report.plot import bar, center, chart, dot, hint, legend, line
from ptql.report.run_files import Block, RunFiles, finite, section
from ptql.report.tables import absent, titled

HEADING, NAME = "Time and memory", "cost"
HEIGHT = 150
MEMORY = (("peak_gpu_bytes", "after", "GPU"), ("peak_host_bytes", "before", "host"))


def cost(run: RunFiles) -> Markup:
    """The section with seconds and peak memory."""
    if not finite(run.series("seconds")):
        return absent(HEADING, NAME, "This run did not note times.")
    figures = [_time(run.blocks), _memory(run.blocks)]
    return titled(HEADING, NAME, tag("p", _words(run)), tag("div", figures, class_="cards"))


def _words(run: RunFiles) -> str:
    whole, learning = (sum(finite(run.series(key))) for key in ("seconds", "seconds_learning"))
    words = f"{duration(whole)} in {plural(len(run.blocks), 'block')}, {duration(learning)} of it learning."
    if (steps := sum(finite(run.series("steps")))) > 0:
        words += f" {plural(int(steps), 'step')}"
        words += f", {1000 * learning / steps:.0f} ms each." if learning > 0 else "."
    if math.isfinite(peak := real(section(run.metrics, "fit").get("peak_gpu_bytes"))):
        words += f" At most {gibibytes(peak):.2f} GiB on the GPU."
    return words


def _time(blocks: list[Block]) -> Markup:
    whole, learning = ([block.number(key) for block in blocks] for key in ("seconds", "seconds_learning"))
    minutes = max(finite(whole)) > 300
    scale, unit = (60, "minutes") if minutes else (1, "seconds")
    y, count = linear_axis([v / scale for v in whole]), len(blocks)
    marks: list[Markup] = []
    for place, block in enumerate(blocks):
        if not math.isfinite(whole[place]):
            continue
        at, share = center(place, count), min(learning[place], whole[place]) if learning[place] > 0 else 0.0
        marks.append(bar(at, 0.7 / count, 0.0, share / scale, y, "after", HEIGHT))
        marks.append(bar(at, 0.7 / count, share / scale, whole[place] / scale, y, "before", HEIGHT))
        words = f"block {block.index}: {duration(whole[place])}, learning {duration(share)}"
        marks.append(hint(at, 1 / count, words, HEIGHT))
    key = legend(("after box", "learning"), ("before box", "reading, measuring, encoding"))
    label = f"{unit} of each block"
    drawing = chart(marks, y, _ticks(blocks), unit=unit, x_title="block", label=label, height=HEIGHT)
    return tag("figure", tag("figcaption", "Time"), key, drawing)


def _memory(blocks: list[Block]) -> Markup | None:
    series = {key: [gibibytes(block.number(key)) for block in blocks] for key, _, _ in MEMORY}
    known = [(key, name, words) for key, name, words in MEMORY if finite(series[key])]
    if not known:
        return None
    y, count = linear_axis([v for key, _, _ in known for v in series[key]]), len(blocks)
    marks: list[Markup] = []
    for key, name, _ in known:
        marks.append(line(series[key], y, name, HEIGHT))
        if count <= 40:
            values = enumerate(series[key])
            marks += [dot(center(i, count), v, y, name, 2.2, HEIGHT) for i, v in values if math.isfinite(v)]
    for place, block in enumerate(blocks):
        words = ", ".join(f"{series[key][place]:.2f} GiB on the {kind}" for key, _, kind in known)
        marks.append(hint(center(place, count), 1 / count, f"block {block.index}: {words}", HEIGHT))
    key = legend(*((name, words) for _, name, words in known))
    label = "Peak memory of each block"
    drawing = chart(marks, y, _ticks(blocks), unit="peak GiB", x_title="block", label=label, height=HEIGHT)
    return tag("figure", tag("figcaption", "Memory"), key, drawing)


def _ticks(blocks: list[Block]) -> list[tuple[float, str]]:
    return [(center(i, len(blocks)), str(blocks[i].index)) for i in index_ticks(len(blocks), 6)]
