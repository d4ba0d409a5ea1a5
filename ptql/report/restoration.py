"""LoRA between two passes: what it learned on, for how long, and its loss."""

from __future__ import annotations

import math
from typing import Any

from ptql.report.axes import linear_axis
from ptql.report.html import Markup, join, tag
from ptql.report.numbers import duration, figure, plural, real
from ptql.report.plot import center, chart, hint, line
from ptql.report.run_files import RunFiles, section
from ptql.report.tables import titled


def restoration(run: RunFiles) -> Markup:
    """The section with the curve; nothing for a run of one pass."""
    found = section(run.metrics, "restoration")
    if not found:
        return join()
    points = _points(found.get("losses"))
    words = f"The first pass's model learned again, by LoRA merged into its quantised weights{_text(found)}"
    steps, tokens, seconds = (real(found.get(key)) for key in ("steps", "tokens", "seconds"))
    if math.isfinite(steps):
        words += f": {plural(round(steps), 'step')}"
        words += f", {figure(tokens, 3)} tokens" if math.isfinite(tokens) else ""
        words += f", {duration(seconds)}" if math.isfinite(seconds) else ""
    words += ". What came of it was quantised once more; all other sections are of that second pass."
    if (skipped := real(found.get("skipped_steps"))) > 0:
        words += f" {plural(round(skipped), 'step')} had gradients that are not finite and were skipped."
    parts: list[Markup] = [tag("p", words)]
    if points:
        parts.append(tag("figure", _curve(points)))
    if (run.path / "first" / "report.html").is_file():
        parts.append(tag("p", tag("a", "The first pass", href="first/report.html"), " has a page of its own."))
    return titled("Restoration", "restoration", *parts)


def _curve(points: list[tuple[int, float]]) -> Markup:
    """Mean training loss over the steps since the point before."""
    values, count = [loss for _, loss in points], len(points)
    y = linear_axis(values)
    every = max(count // 6, 1)
    ticks = [(center(i, count), f"{points[i][0]:,}") for i in range(every - 1, count, every)]
    hints = [hint(center(i, count), 1 / count, f"step {step}: {figure(loss)}") for i, (step, loss) in enumerate(points)]
    label = f"Training loss of LoRA from {figure(values[0])} to {figure(values[-1])}"
    return chart([line(values, y, "after"), *hints], y, ticks, unit="loss, nats a token", x_title="step", label=label)


def _points(found: Any) -> list[tuple[int, float]]:
    pairs = found if isinstance(found, list) else []
    return [
        (int(pair[0]), real(pair[1]))
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int)
    ]


def _text(found: dict[str, Any]) -> str:
    texts = found.get("text")
    return f", on {', '.join(str(text) for text in texts)}" if isinstance(texts, list) and texts else ""
