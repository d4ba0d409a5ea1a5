"""Perplexities and task scores, beside those of the full-precision model where they were measured."""

from __future__ import annotations

import math
from typing import Any

from ptql.report.html import Markup, join, tag
from ptql.report.numbers import figure, real
from ptql.report.run_files import RunFiles, section
from ptql.report.tables import DASH, absent, table, titled

HEADING, NAME = "Quality", "quality"
ADAPTED = (
    "The last blocks learned on the text itself, without labels; without and with it are over the same windows. "
    "A mark of rlq: as the original code, without rounding the last block's activations."
)


def quality(run: RunFiles) -> Markup:
    """The section on what the model can still do."""
    perplexities, scores = _perplexities(run), _scores(run)
    if not perplexities and not scores:
        command = tag("code", "ptql eval --run RUN")
        return absent(HEADING, NAME, "Nothing has been measured yet: ", command, " adds perplexity and tasks.")
    parts: list[Markup] = []
    if perplexities:
        columns = ["Text", "Full precision", "Quantised", "Ratio", "Windows"]
        parts += [tag("h3", "Perplexity"), tag("p", "Lower is better.", class_="hint-line")]
        parts.append(table(columns, perplexities, "Perplexity on each text"))
    if adapted := _adapted(run):
        columns = ["Text", "Adaptation", "Without", "With", "Windows", "Learned on", "Seconds"]
        parts += [tag("h3", "Test-time adaptation"), tag("p", ADAPTED, class_="hint-line")]
        parts.append(table(columns, adapted, "Perplexity without and with test-time adaptation", 2))
    if scores:
        columns = ["Task", "Metric", "Full precision", "Quantised", "Change", "Questions"]
        parts += [tag("h3", "Tasks"), tag("p", _tasks_words(run), class_="hint-line")]
        parts.append(table(columns, scores, "Scores on each task", 2))
    if not section(run.metrics, "source"):
        parts.append(tag("p", "The full-precision model was not measured.", class_="absent"))
    return titled(HEADING, NAME, parts)


def _perplexities(run: RunFiles) -> list[list[object]]:
    ours, source = section(run.metrics, "ppl"), section(run.metrics, "source", "ppl")
    rows = []
    for name in dict.fromkeys([*ours, *source]):
        a, b = real(ours.get(name)), real(source.get(name))
        ratio = f"×{figure(a / b, 3)}" if math.isfinite(a) and math.isfinite(b) and b > 0 else DASH
        details = section(run.metrics, "ppl_details", name)
        windows = f"{details['windows']} × {details.get('length', '?')} tokens" if "windows" in details else DASH
        rows.append([name, _shown(source, name), _shown(ours, name), ratio, windows])
    return rows


def _adapted(run: RunFiles) -> list[list[object]]:
    """A row for each text, and each task's metric, of each adaptation."""
    rows: list[list[object]] = []
    for name in section(run.metrics, "tta"):
        found = section(run.metrics, "tta", name)
        label = f"{name} ({found['compat']})" if found.get("compat", name) != name else name
        ppl, without = section(found, "ppl"), section(found, "without")
        for text in ppl:
            details = section(found, "details", text)
            counts = [details.get(key, DASH) for key in ("windows", "adapted_on", "seconds")]
            rows.append([text, label, _shown(without, text), _shown(ppl, text), *counts])
        for task in section(found, "tasks"):
            mine, before = section(found, "tasks", task), section(found, "tasks_without", task)
            details = section(found, "task_details", task)
            counts = [details.get(key, DASH) for key in ("documents", "adapted_on", "seconds")]
            for metric in mine:
                if metric != "n" and not metric.partition(",")[0].endswith("_stderr"):
                    values = _score(before, metric), _score(mine, metric)
                    rows.append([f"{task}, {metric}", label, *values, *counts])
    return rows


def _shown(values: dict[str, Any], name: str) -> str:
    return figure(values[name]) if name in values else DASH


def _scores(run: RunFiles) -> list[list[object]]:
    ours, source = _results(run.metrics), _results(section(run.metrics, "source"))
    rows = []
    for task in dict.fromkeys([*ours, *source]):
        mine, theirs = section(ours, task), section(source, task)
        for metric in dict.fromkeys([*mine, *theirs]):
            if metric == "n" or metric.partition(",")[0].endswith("_stderr"):
                continue
            a, b = real(mine.get(metric)), real(theirs.get(metric))
            change = f"{a - b:+.3f}".replace("-", "−") if math.isfinite(a) and math.isfinite(b) else DASH
            count = mine.get("n", theirs.get("n", DASH))
            rows.append([task, metric, _score(theirs, metric), _score(mine, metric), change, count])
    return rows


def _results(metrics: dict[str, Any]) -> dict[str, Any]:
    tasks = section(metrics, "tasks")
    return section(tasks, "results") if "results" in tasks else tasks


def _score(scores: dict[str, Any], metric: str) -> Markup:
    if metric not in scores:
        return join(DASH)
    name, comma, chosen = metric.partition(",")
    error = real(scores.get(f"{name}_stderr{comma}{chosen}"))
    spread = tag("span", f" ± {error:.3f}", class_="spread") if math.isfinite(error) else None
    return join(f"{real(scores[metric]):.3f}", spread)


def _tasks_words(run: RunFiles) -> str:
    tasks = section(run.metrics, "tasks") or section(run.metrics, "source", "tasks")
    version, limit = tasks.get("lm_eval_version"), tasks.get("limit")
    words = f"lm-eval {version}; " if version else ""
    few = f" The first {limit} questions of each task." if limit else ""
    return f"{words}± is one standard error.{few}"
