"""What an evaluation leaves behind: the file of metrics and the tables on the terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptql.errors import InputError


def merge_metrics(path: Path, update: Mapping[str, Any]) -> dict[str, Any]:
    """Add `update` to the JSON file of metrics, and return what the file then holds.

    Dicts are merged key by key at every depth, but for those that name their `settings`: with other settings they
    replace the old ones, or figures of both would stand side by side. Any other value replaces the old one. Infinities
    and nan, which JSON doesn't have, are stored as "inf", "-inf" and "nan". The file is replaced in one step,
    so that a kill never leaves half of it; missing folders are made.

    Raises:
        InputError: The file is there but can't be read as a JSON object.
    """
    merged = _deep_merge(read_metrics(path), _storable(update))
    text = json.dumps(merged, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return merged


def print_results(metrics: Mapping[str, Any], console: Console) -> None:
    """Print the perplexities, task scores and size in `metrics`, which has the shape of metrics.json.

    Absent parts are left out. Tasks show acc and acc_norm side by side; their other metrics have a table
    of their own, and test-time adaptation has one.
    """
    if metrics.get("ppl"):
        console.print(results_table(_text_rows(metrics)))
    if rows := _adapted_text_rows(metrics):
        console.print(results_table(rows))
    if compat := [f"{name} (compat: {t['compat']})" for name, t in metrics.get("tta", {}).items() if "compat" in t]:
        console.print(Text(f"{', '.join(compat)}: as the original code, without rounding the last block's activations"))
    accuracies, others = _task_rows(metrics.get("tasks", {}).get("results", {}))
    for rows in (accuracies, others, _adapted_task_rows(metrics.get("tta", {}))):
        if rows:
            console.print(results_table(rows))
    if size := _size_line(metrics):
        console.print(Text(size))


def results_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Table with one line per row and one column per key, in the order in which the keys first occur.

    The first column wraps where space is short and the others, right-aligned, stay whole.
    """
    table = Table(box=box.SIMPLE)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        if column == columns[0]:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row.get(column, "")) for column in columns))  # Text: "[x]" is no markup
    return table


def _text_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of perplexities, one a text."""
    rows = []
    for text, value in metrics["ppl"].items():
        kind = metrics.get("ppl_details", {}).get(text, {}).get("domain")
        rows.append({"text": text, **({"domain": kind} if kind else {}), "perplexity": _number(value, 2)})
    return rows


def _adapted_text_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of perplexities without and with test-time adaptation, one for each text and adaptation.

    They are over the same windows, and in seconds of adapting and measuring.
    """
    return [
        {
            "text": text,
            "adaptation": f"{name} (as {tta['compat']})" if tta.get("compat", name) != name else name,
            "windows": str(tta["details"][text]["windows"]),
            "without": _number(tta["without"][text], 2),
            "with": _number(value, 2),
            "seconds": _number(tta["details"][text]["seconds"], 1),
        }
        for text in metrics.get("ppl", {})
        for name, tta in metrics.get("tta", {}).items()
        if (value := tta.get("ppl", {}).get(text)) is not None
    ]


def _task_rows(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of accuracies, one a task, and rows of the other metrics, one a metric."""
    accuracies, others = [], []
    for task, scores in results.items():
        head = {"task": task, "n": str(scores.get("n", ""))}
        if "acc" in scores or "acc_norm" in scores:
            pair = {f"{name} (stderr)": _score(scores, name) for name in ("acc", "acc_norm")}
            accuracies.append(head | pair)
        others += [
            head | {"metric": name, "value (stderr)": _score(scores, name)}
            for name in scores
            if name not in ("n", "acc", "acc_norm") and not name.partition(",")[0].endswith("_stderr")
        ]
    return accuracies, others


def _adapted_task_rows(adaptations: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of a task's scores without and with test-time adaptation, one for each metric and adaptation."""
    return [
        {
            "task": task,
            "metric": metric,
            "adaptation": name,
            "n": str(scores.get("n", "")),
            "without": _number(tta["tasks_without"][task][metric], 3),
            "with": _number(scores[metric], 3),
        }
        for name, tta in adaptations.items()
        for task, scores in tta.get("tasks", {}).items()
        for metric in scores
        if metric != "n" and not metric.partition(",")[0].endswith("_stderr")
    ]


def _score(scores: Mapping[str, Any], name: str) -> str:
    """A metric with its standard error, if any; "" if the task has no such metric."""
    if name not in scores:
        return ""
    # lm-eval's names: "acc" and "acc_stderr", "exact_match,strict" and "exact_match_stderr,strict"
    metric, comma, chosen = name.partition(",")
    stderr = scores.get(f"{metric}_stderr{comma}{chosen}")
    return _number(scores[name], 3) + ("" if stderr is None else f" ({_number(stderr, 3)})")


def _size_line(metrics: Mapping[str, Any]) -> str:
    parts = [
        f"{_number(metrics[key], 3)} {label}"
        for key, label in (
            ("bits_per_weight", "bits per weight"),
            ("bits_per_weight_with_embeddings", "with embeddings"),
        )
        if key in metrics
    ]
    if "size_bytes" in metrics:
        parts.append(f"{_number(metrics['size_bytes'] / 1e6, 1)} MB")
    return ", ".join(parts)


def _number(value: float | str, digits: int) -> str:
    """`value` with so many decimals, or in powers of ten from 100,000 up; "inf" and "nan" as they are."""
    if isinstance(value, str):
        return value
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"


def read_metrics(path: Path) -> dict[str, Any]:
    """What the JSON file of metrics holds, `{}` if there is none; `InputError` if it can't be read."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise InputError(f"{path}: not a readable JSON file ({error}); move it away or name another") from error
    if not isinstance(metrics, dict):
        raise InputError(f"{path}: holds a JSON {type(metrics).__name__} where an object is needed; move it away")
    return metrics


def _deep_merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and _same_settings(before, value):
            value = _deep_merge(before, value)
        merged[key] = value
    return merged


def _same_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return old.get("settings", new.get("settings")) == new.get("settings")


def _storable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value
