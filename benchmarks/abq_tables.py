"""Tables of the results that `benchmarks/abq.py` writes; needs no GPU.

    python benchmarks/abq_tables.py FILE.jsonl ...
    python benchmarks/abq_tables.py FILE.jsonl --docs docs/methods/abq.md

The second puts each table between the lines <!-- begin: NAME --> and <!-- end: NAME --> of the Markdown file that has
them, NAME being grid, parts, tasks, budget or start; a table without rows leaves what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.abq import METHODS, PLANS, SCHEMES, SEARCH, STARTS, WITHOUT  # noqa: E402
from benchmarks.calibration_tables import fill, markdown  # noqa: E402
from benchmarks.lrquant_tables import listed  # noqa: E402
from benchmarks.tables import NONE, short  # noqa: E402

Row = dict[str, Any]
Tables = Mapping[str, tuple[Callable[[list[Row]], str], tuple[str, ...]]]
"""Each table, and the plans whose rows it shows beside its own."""


def read_rows(files: list[Path], plans: Collection[str] = PLANS, writer: str = "benchmarks/abq.py") -> list[Row]:
    """The rows of all files; of the lines of one row on one machine the last counts."""
    rows: dict[tuple[str, str], Row] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                assert row["plan"] in plans
                rows[row["machine"], row["name"]] = row
            except (ValueError, LookupError, TypeError, AssertionError) as error:
                reason = f"not a line of {writer} ({error!r})"
                raise SystemExit(f"{file}:{number}: {reason}; remove it") from None
    return list(rows.values())


def tables(rows: list[Row], which: Tables | None = None) -> dict[str, str]:
    """Every table that has rows, by name, for each machine and text that was calibrated on, each after a line that says
    which; with a newline."""
    made = {}
    for plan, (table, needs) in (which or TABLES).items():
        parts = []
        for place in dict.fromkeys(_place(row) for row in rows if row["plan"] == plan):
            same = [row for row in rows if _place(row) == place and row["plan"] in (plan, *needs)]
            own = [row for row in same if row["plan"] == plan]
            parts.append(f"{machine_words(own)}\n\n{table(same)}")
        if parts:
            made[plan] = "\n".join(parts)
    return made


def _place(row: Row) -> tuple[str, str]:
    return row["machine"], row["calibration"]


def machine_words(rows: list[Row]) -> str:
    """Which machine, which versions, how it was calibrated."""
    last = rows[-1]
    versions = [f"{name} {last[name]}" for name in ("torch", "lightning", "transformers") if last.get(name)]
    data = listed(f"{row['samples']} × {row['length']}" for row in rows)
    words = (
        f"{last['machine']}; {', '.join(versions)}; calibrated on {listed(row['calibration'] for row in rows)}, {data}"
    )
    seeds, at_once = (listed(row[key] for row in rows) for key in ("seed", "jobs_at_once"))
    return f"{words} tokens, seed {seeds}; runs at once: {at_once}."


def ppl_cells(row: Row | None, texts: list[str]) -> list[str]:
    return [short(row["ppl"][text]) if row and text in row["ppl"] else NONE for text in texts]


def bits(row: Row) -> str:
    return f"{row['bits_per_weight']:.3f}"


def texts_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(text for row in rows for text in row["ppl"]))


def grid_table(rows: list[Row]) -> str:
    """A row a scheme: perplexities of each method, and true bits."""
    texts, lines = texts_of(rows), []
    for scheme in SCHEMES:
        found = {row["method"]: row for row in rows if row["scheme"] == scheme}
        if not found:
            continue
        spent = listed(bits(found[method]) for method in METHODS if method in found)
        count = listed(row["epochs"] for row in found.values())
        cells = [cell for text in texts for m in METHODS for cell in ppl_cells(found.get(m), [text])]
        lines.append([scheme, count, *cells, spent])
    heads = ["scheme", "epochs", *(f"{method}, {text}" for text in texts for method in METHODS), "bits per weight"]
    return markdown(heads, lines, words=1)


def parts_table(rows: list[Row]) -> str:
    """A row a variant, the recipe first: perplexities on the first text, then on the others, a column a scheme."""
    texts = texts_of(rows)
    schemes = [scheme for scheme in SCHEMES if any(row["scheme"] == scheme for row in rows)]
    by_place = {(row["label"], row["scheme"]): row for row in rows if row["method"] == "abq"}
    labels = ["abq", *WITHOUT]
    parts = []
    for text in texts:
        lines = [
            [
                "as shipped" if label == "abq" else label,
                *(ppl_cells(by_place.get((label, s)), [text])[0] for s in schemes),
            ]
            for label in labels
        ]
        parts.append(markdown([f"abq, {text} ppl", *schemes], lines, words=1))
    return "\n".join(parts)


def tasks_table(rows: list[Row]) -> str:
    """A row a model: acc, and acc_norm where a task has it, and their means over the tasks."""
    found = {row["label"]: row["tasks"]["results"] for row in rows}
    sources = [row["source"]["tasks"]["results"] for row in rows if "source" in row]
    order = ("rtn", *METHODS)
    found = {label: found[label] for label in sorted(found, key=order.index)}
    found = {**({"fp": sources[0]} if sources else {}), **found}
    names = list(next(iter(found.values())))
    lines = []
    for label, tasks in found.items():
        cells = []
        for name in names:
            acc, norm = (tasks[name].get(metric) for metric in ("acc", "acc_norm"))
            cells.append(f"{100 * acc:.1f}" + (f" / {100 * norm:.1f}" if norm is not None else ""))
        accs = [tasks[name]["acc"] for name in names]
        norms = [tasks[name].get("acc_norm", tasks[name]["acc"]) for name in names]
        lines.append([label, *cells, *(f"{100 * sum(values) / len(values):.2f}" for values in (accs, norms))])
    heads = ["W4A4", *(name.removesuffix("_local") for name in names), "mean acc", "mean acc_norm, else acc"]
    return markdown(heads, lines, words=1)


def plain_table(rows: list[Row]) -> str:
    """A row each: scheme, what differs, true bits, perplexities."""
    texts = texts_of(rows)
    order = {scheme: place for place, scheme in enumerate(("w2a8", "w2ba8", "w2a16", "w3a16", "w4a16"))}
    shown = sorted(rows, key=lambda r: (order.get(r["scheme"], 9), r["method"], r["plan"] != "grid", r["label"]))
    lines = [[row["scheme"], row["label"], str(row["epochs"]), bits(row), *ppl_cells(row, texts)] for row in shown]
    return markdown(
        ["scheme", "bits or start", "epochs", "bits per weight", *(f"{t} ppl" for t in texts)], lines, words=2
    )


def budget_table(rows: list[Row]) -> str:
    """A row each size, start and choice: true bits, and perplexities, their mean and extremes over seeds."""
    texts = texts_of(rows)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        learned = row["epochs"], row["samples"], row["length"]
        groups.setdefault((row["scheme"], start_of(row), learned, not row["label"].startswith("unif")), []).append(row)
    lines = []
    for (scheme, start, (epochs, samples, length), _), own in sorted(groups.items()):
        cells = [over_seeds([row["ppl"][text] for row in own]) for text in texts]
        facts = [own[0]["label"], str(len(own)), str(epochs), f"{samples} × {length}", bits(own[-1])]
        lines.append([scheme, start, *facts, *cells])
    heads = ["scheme", "clipping begins by", "bits", "seeds", "epochs", "tokens", "bits per weight"]
    return markdown([*heads, *(f"{text} ppl" for text in texts)], lines, words=3)


def start_of(row: Row) -> str:
    """Where clipping begins, as the row's command says it."""
    option, words = SEARCH[0], row["command"].split()
    return STARTS[option, words[words.index(option) + 1]]


def over_seeds(values: list[float]) -> str:
    """The mean, with the least and the most where there are several."""
    mean = short(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({short(min(values))} to {short(max(values))})"


def start_table(rows: list[Row]) -> str:
    """Beside each the same with the usual start, from the grid."""
    runs = {(row["scheme"], row["method"]) for row in rows if row["plan"] == "start"}
    return plain_table([row for row in rows if (row["scheme"], row["method"]) in runs])


TABLES: Tables = {
    "grid": (grid_table, ()),
    "parts": (parts_table, ("grid",)),
    "tasks": (tasks_table, ()),
    "budget": (budget_table, ()),
    "start": (start_table, ("grid",)),
}


def main(arguments: list[str] | None = None) -> None:
    run(__doc__, TABLES, PLANS, "benchmarks/abq.py", arguments)


def run(
    doc: str | None, which: Tables, plans: Collection[str], writer: str, arguments: list[str] | None = None
) -> None:
    """Print the tables of the files that the command line names, or put them into a page.

    Args:
        doc: What they are, for --help.
        which: There are.
        plans: Whose rows may be in the files.
        writer: Of the files.
        arguments: The command line.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--docs", type=Path, metavar="PAGE.md")
    args = parser.parse_args(arguments)
    made = tables(read_rows(args.files, plans, writer), which)
    if args.docs is None:
        print("\n".join(made.values()), end="")
        return
    page = args.docs.read_text(encoding="utf-8")
    for name, table in made.items():
        page = fill(page, table, name) if f"<!-- begin: {name} -->" in page else page
    args.docs.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
