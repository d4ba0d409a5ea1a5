"""Tables of the results that `benchmarks/rptq.py` writes; needs no GPU.

    python benchmarks/rptq_tables.py FILE.jsonl ...
    python benchmarks/rptq_tables.py FILE.jsonl ... --docs docs/methods/rptq.md (or gptq.md)

The second puts each table between the lines <!-- begin: NAME --> and <!-- end: NAME --> of the Markdown file that has
them, NAME being grid, clusters, ranges, weights, learned or codes; a table without rows leaves what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.abq_tables import Row, Tables, bits, ppl_cells, run, texts_of  # noqa: E402
from benchmarks.calibration_tables import markdown  # noqa: E402
from benchmarks.rptq import COUNTS, GROUPED, KINDS, LEARNED, PLANS, RANGES, SCHEMES, WEIGHTS  # noqa: E402
from benchmarks.tables import NONE  # noqa: E402

RECIPE = ("W4A4: rptq", "W4A4: rptq, ranges by mse")
ORDER = [*RECIPE, *map(str, COUNTS), *RANGES, *WEIGHTS, *LEARNED, *GROUPED]
"""Of lines in a table: rows come as they were ready."""


def grid_table(rows: list[Row]) -> str:
    """For each text a line a scheme, a column a kind."""
    by_label = {row["label"]: row for row in rows}
    parts = []
    for text in texts_of(rows):
        lines = [
            [name, *(ppl_cells(by_label.get(f"{name}: {kind}"), [text])[0] for kind in KINDS), _bits(by_label, name)]
            for name in SCHEMES
            if any(label.startswith(f"{name}: ") for label in by_label)
        ]
        parts.append(markdown([f"{text} ppl", *KINDS, "bits per weight, rptq"], lines, words=1))
    return "\n".join(parts)


def _bits(by_label: dict[str, Row], name: str) -> str:
    row = by_label.get(f"{name}: rptq")
    return NONE if row is None else bits(row)


def plain_table(rows: list[Row]) -> str:
    """A line each, in the plan's order; those of the grid, which stand beside them, first."""
    texts = texts_of(rows)
    shown = sorted(rows, key=lambda row: ORDER.index(row["label"]))
    lines = [[row["label"], str(row["epochs"]), bits(row), *ppl_cells(row, texts)] for row in shown]
    return markdown(["", "epochs", "bits per weight", *(f"{text} ppl" for text in texts)], lines, words=1)


def beside_recipe(rows: list[Row]) -> str:
    """Below the recipe itself, at W4A4."""
    return plain_table([row for row in rows if row["plan"] != "grid" or row["label"] in RECIPE])


TABLES: Tables = {
    "grid": (grid_table, ()),
    "clusters": (plain_table, ()),
    "ranges": (beside_recipe, ("grid",)),
    "weights": (plain_table, ()),
    "learned": (beside_recipe, ("grid",)),
    "codes": (plain_table, ()),
}


def main(arguments: list[str] | None = None) -> None:
    run(__doc__, TABLES, PLANS, "benchmarks/rptq.py", arguments)


if __name__ == "__main__":
    main()
