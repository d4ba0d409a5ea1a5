"""Tables of the results that `benchmarks/lrquant.py` writes; needs no GPU.

    python benchmarks/lrquant_tables.py FILE.jsonl ...
    python benchmarks/lrquant_tables.py FILE.jsonl --docs docs/methods/lrquant.md

The second puts each table between the lines <!-- begin: NAME --> and <!-- end: NAME --> of the Markdown file, NAME
being tta, ablation, nlc or plus; a table without rows leaves what is there. Of the lines of one row the last counts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.calibration_tables import fill, markdown  # noqa: E402
from benchmarks.lrquant import TTA  # noqa: E402
from benchmarks.tables import NONE, short  # noqa: E402

Row = dict[str, Any]
PARTS = {"lr": "learning rate", "epochs": "epochs", "blocks": "blocks", "loss": "loss"}
"""What a setting of the ablation varies, in the order of the table."""
TARGETS = "T1 is the fp block on the fp stream, T2 on the quantised one"


def read_rows(files: list[Path]) -> list[Row]:
    """The rows of all files; of the lines of one row on one machine the last counts."""
    rows: dict[tuple[str, str], Row] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                assert row["plan"] in TABLES
                assert row["ppl"]
                rows[row["machine"], row["name"]] = row
            except (ValueError, LookupError, TypeError, AssertionError) as error:
                reason = f"not a line of benchmarks/lrquant.py ({error!r})"
                raise SystemExit(f"{file}:{number}: {reason}; remove it") from None
    return list(rows.values())


def tables(rows: list[Row]) -> dict[str, str]:
    """Every table that has rows, by name, machine by machine, each after a line that says which; with a newline."""
    made = {}
    for plan, table in TABLES.items():
        own = [row for row in rows if row["plan"] == plan]
        parts = []
        for machine in dict.fromkeys(row["machine"] for row in own):
            same = [row for row in own if row["machine"] == machine]
            parts.append(f"{machine_words(same)}\n\n{table(same)}")
        if parts:
            made[plan] = "\n".join(parts)
    return made


def machine_words(rows: list[Row]) -> str:
    """Which machine, which versions, how it was calibrated."""
    last = rows[-1]
    versions = [f"{name} {last[name]}" for name in ("torch", "lightning", "transformers") if last.get(name)]
    epochs = listed(row["epochs"] for row in rows)
    data = listed(f"{row['samples']} × {row['length']}" for row in rows)
    calibrated = f"{listed(row['scheme'] for row in rows)}, {epochs} epochs, {data} tokens"
    words = f"{last['machine']}; {', '.join(versions)}; {calibrated}"
    return f"{words}; runs at once: {listed(row['jobs_at_once'] for row in rows)}."


def listed(values: Any) -> str:
    """Different values in the order in which they occur."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


# Test-time adaptation


def tta_table(rows: list[Row]) -> str:
    """Calibration by text; seconds of adapting and measuring in brackets. A part of the text has its own start."""
    lines = []
    for row in rows:
        for text, details in row["ppl_details"].items():
            cells = [row["calibration"], text, details.get("domain") or NONE, str(details["windows"])]
            cells += [short(row["source"]["ppl"][text]) if "source" in row else NONE]
            cells += [f"{short(row['ppl'][text])} ({took(details['seconds'])})"]
            for name in TTA:
                cells += [without(row, name, text)] if name == "prefix" else []
                cells += [adapted(row, name, text)]
            lines.append(cells)
    heads = ["calibrated on", "text", "domain", "windows", "source", "without (s)"]
    for name in TTA:
        heads += ["the rest without"] if name == "prefix" else []
        heads += [f"{name} (s)"]
    return markdown(heads, lines, words=3)


def adapted(row: Row, name: str, text: str) -> str:
    """Perplexity after adapting and the seconds that it took."""
    found = row.get("tta", {}).get(name, {})
    if text not in found.get("ppl", {}):
        return NONE
    return f"{short(found['ppl'][text])} ({took(found['details'][text]['seconds'])})"


def took(seconds: float) -> str:
    """Seconds, with a decimal where there are few."""
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}"


def without(row: Row, name: str, text: str) -> str:
    """Perplexity without adapting, of the windows that are measured after it, and how many these are."""
    found = row.get("tta", {}).get(name, {})
    if text not in found.get("without", {}):
        return NONE
    return f"{short(found['without'][text])} on {found['details'][text]['windows']}"


# The ablation


def ablation_table(rows: list[Row]) -> str:
    """What one number changes, the others as most have them: a row a value, a column a text."""
    parts = []
    for calibration in dict.fromkeys(row["calibration"] for row in rows):
        own = [row for row in rows if row["calibration"] == calibration]
        texts = list(dict.fromkeys(text for row in own for text in row["ppl"]))
        settings: dict[str, Row] = {name: setting for row in own for name, setting in row["settings"].items()}
        cells = ["without", ""]
        for text in texts:
            cells += [next(short(row["ppl"][text]) for row in own if text in row["ppl"]), NONE]
        lines = [cells]
        for words, values in varied(settings):
            for place, (value, name) in enumerate(values):
                cells = ["" if place else words, shown(value)]
                for text in texts:
                    row = next((row for row in own if text in row["ppl"] and name in row.get("tta", {})), {})
                    found = row.get("tta", {}).get(name, {})
                    cells += [short(found["ppl"][text]) if row else NONE]
                    cells += [took(found["details"][text]["seconds"]) if row else NONE]
                lines.append(cells)
        heads = ["what changes", "to", *(part for text in texts for part in (f"{text} ppl", "s"))]
        windows = listed(row["ppl_details"][text]["windows"] for row in own for text in row["ppl"])
        rest = others(settings)
        parts.append(f"Calibrated on {calibration}; windows: {windows}; {rest}.\n\n{markdown(heads, lines, words=2)}")
    return "\n".join(parts)


def varied(settings: dict[str, Row]) -> list[tuple[str, list[tuple[Any, str]]]]:
    """What is varied, in words, and how; losses also where another number of blocks than elsewhere adapts."""
    usual = usual_of(settings)
    found = [(words, along(part, settings, usual)) for part, words in PARTS.items()]
    for blocks in sorted({setting["blocks"] for setting in settings.values()} - {usual["blocks"]}):
        found.append((f"loss, {blocks} blocks", along("loss", settings, {**usual, "blocks": blocks})))
    return found


def along(part: str, settings: dict[str, Row], usual: Row) -> list[tuple[Any, str]]:
    """The settings that differ from `usual` in `part` alone: its value and the setting's name; numbers by size."""
    same = {"lr": ("lr", "weight_lr")}.get(part, (part,))
    found = {
        setting[part]: name
        for name, setting in settings.items()
        if all(setting[key] == usual[key] for key in usual if key not in same)
    }
    by_size = sorted(found.items(), key=lambda item: item[0] if isinstance(item[0], (int, float)) else 0)
    return by_size if len(found) > 1 else []


def usual_of(settings: dict[str, Row]) -> Row:
    """Of each part the value that most settings have."""
    keys = next(iter(settings.values()))
    return {key: statistics.mode(setting[key] for setting in settings.values()) for key in keys}


def others(settings: dict[str, Row]) -> str:
    """What the parts are where they do not change."""
    usual = usual_of(settings)
    rates = listed(shown(usual[key]) for key in ("lr", "weight_lr"))
    words = f"elsewhere learning rates {rates}, epochs {usual['epochs']}, blocks {usual['blocks']}, {usual['loss']}"
    return f"{words} ({TARGETS})"


def shown(value: float | str | None) -> str:
    """A part's value; None is the recipe's."""
    return "recipe's" if value is None else value if isinstance(value, str) else f"{value:g}"


# Losses and starts over seeds


def nlc_table(rows: list[Row]) -> str:
    """A row a variant: mean, sample standard deviation and extremes over seeds."""
    labels = list(dict.fromkeys((row["calibration"], row["label"]) for row in rows))
    texts = list(dict.fromkeys(text for row in rows for text in row["ppl"]))
    lines = []
    for calibration, label in labels:
        own = [row for row in rows if (row["calibration"], row["label"]) == (calibration, label)]
        cells = [label, listed(sorted(row["seed"] for row in own))]
        for text in texts:
            cells += spread([row["ppl"][text] for row in own if text in row["ppl"]])
        lines.append(cells)
    heads = ["loss, start of the scales", "seeds"]
    heads += [part for text in texts for part in (f"{text} ppl, mean", "deviation", "min – max")]
    words = f"Calibrated on {listed(calibration for calibration, _ in labels)}; deviation: of the sample (n - 1)."
    return f"{words}\n\n{markdown(heads, lines, words=2)}"


def spread(values: list[float | str]) -> list[str]:
    """Mean, sample standard deviation, extremes; dashes for what so few values do not tell."""
    numbers = [float(value) for value in values]
    if not numbers:
        return [NONE, NONE, NONE]
    if not all(math.isfinite(number) for number in numbers):
        return [listed(number for number in numbers if not math.isfinite(number)), NONE, NONE]
    deviation = short(statistics.stdev(numbers)) if len(set(numbers)) > 1 else NONE if len(numbers) < 2 else "0"
    return [short(statistics.mean(numbers)), deviation, f"{short(min(numbers))} – {short(max(numbers))}"]


# LRQuant+


def plus_table(rows: list[Row]) -> str:
    """A row a variant: perplexities, true bits, seconds of learning a block for an epoch."""
    texts = list(dict.fromkeys(text for row in rows for text in row["ppl"]))
    lines = []
    for row in sorted(rows, key=lambda row: row["label"] != "LRQuant"):
        fit = row["fit"]
        cells = [row["label"], *(short(row["ppl"][text]) if text in row["ppl"] else NONE for text in texts)]
        steps = fit["blocks"] * row["epochs"]
        pace = f"{fit['seconds_learning'] / steps:.2f}" if steps else NONE
        bits = f"{row['bits_per_weight']:.3f}" if "bits_per_weight" in row else NONE
        lines.append([*cells, bits, pace])
    heads = ["recipe", *(f"{text} ppl" for text in texts), "bits per weight", "s per block-epoch"]
    calibrated = listed(row["calibration"] for row in rows)
    return f"Calibrated on {calibrated}.\n\n{markdown(heads, lines, words=1)}"


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "tta": tta_table,
    "ablation": ablation_table,
    "nlc": nlc_table,
    "plus": plus_table,
}


def main(arguments: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--docs", type=Path, metavar="PAGE.md")
    args = parser.parse_args(arguments)
    made = tables(read_rows(args.files))
    if args.docs is None:
        print("\n".join(made.values()), end="")
        return
    page = args.docs.read_text(encoding="utf-8")
    for name, table in made.items():
        page = fill(page, table, name)
    args.docs.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
